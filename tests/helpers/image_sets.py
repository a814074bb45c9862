"""Write tiny image sets to disk in the layouts that the trainer reads."""

import hashlib
import pickle
import struct

import numpy as np
from PIL import Image


def write_image_folder(root, *, count=6, size=(8, 8), splits=("train", "test"), classes=("b c", "a")):
    """Write a small set of PNG files whose classes differ in color."""
    random = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(sorted(classes)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (*size, 3)) + np.array([120, 0, 0]) * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def write_mnist(root, *, train=64, test=16, name="MNIST"):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root


def write_tiny_imagenet(root, *, count=3, size=(16, 16), classes=("n02", "n01")):
    """Write train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt; classes are shades of grey."""

    def save(file, label):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (60 * label,) * 3).save(file)

    lines = []
    for label, wnid in enumerate(sorted(classes)):
        for i in range(count):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    for i, wnid in enumerate(classes):
        save(root / "val" / "images" / f"val_{i}.JPEG", sorted(classes).index(wnid))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def write_cifar(kind, root, *, count=4):
    """Write the files of torchvision's class `kind`, with `count` images each.

    Returns the class attributes that name their checksums, which are not those of the originals.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random, key = np.random.default_rng(0), "fine_labels" if kind.meta["key"].startswith("fine") else "labels"

    def write(name, content):
        content = pickle.dumps(content)
        (folder / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    def split(files):
        for name, _ in files:
            content = {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), key: list(range(count))}
            yield [name, write(name, content)]

    names = [f"class {i}" for i in range(100 if key == "fine_labels" else 10)]
    return {
        "train_list": list(split(kind.train_list)),
        "test_list": list(split(kind.test_list)),
        "meta": {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: names})},
    }
