"""Tiny image sets written to disk in the layouts the trainer reads."""

import struct

import numpy as np
from PIL import Image


def write_image_folder(root, *, count=6, size=(8, 8), splits=("train", "test"), classes=("b c", "a")):
    """A small PNG set whose classes differ in colour."""
    random = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(sorted(classes)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (*size, 3)) + np.array([120, 0, 0]) * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def write_mnist(root, *, train=64, test=16):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root
