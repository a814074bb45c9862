"""Keep the tokens of a text in a file that is mapped into memory."""

import json
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..files import write_atomically
from .image_files import one_line, printable

END = struct.Struct("<QI")  # of a file: the number of bytes of the description before it, and their checksum
STEP = 1 << 24  # bytes of tokens per call of the checksum


class EncodedText(NamedTuple):
    """A text as tokens, with what `TextData` tells about them."""

    train: np.ndarray  # (N,), unsigned integers
    test: np.ndarray  # (M,), of the same dtype
    classes: list[str]
    bytes_per_token: float
    tokenizer: str | None = None


def save_encoded(path: Path, encoded: EncodedText) -> bool:
    """Write the tokens of a text completely or not at all; say so and return False if the disk does not take them."""
    train, test, *rest = encoded
    sizes, sums = (len(train), len(test)), (checksum(train), checksum(test))
    description = json.dumps([train.dtype.str, sizes, sums, *rest]).encode()

    def write(file: BinaryIO) -> None:
        for tokens in (train, test):
            tokens.tofile(file)
        file.write(description + END.pack(len(description), zlib.crc32(description)))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        print(printable(f"{path}: the tokens were not cached ({one_line(error)})"))
        return False
    return True


def load_encoded(path: Path) -> EncodedText | None:
    """Return the tokens of a text, mapped from a file; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            file.seek(-END.size, 2)
            length, expected = END.unpack(file.read())
            file.seek(-END.size - length, 2)
            description = file.read(length)
        if zlib.crc32(description) != expected:
            return None
        dtype, sizes, sums, *rest = json.loads(description)
        tokens = np.memmap(path, dtype, "r", shape=(sum(sizes),))
    except (OSError, ValueError, struct.error):
        return None
    parts = tokens[: sizes[0]], tokens[sizes[0] :]
    if [checksum(part) for part in parts] != sums:
        return None
    return EncodedText(*parts, *rest)


def checksum(tokens: np.ndarray) -> int:
    """Return the CRC-32 of tokens (N,), read part by part."""
    total, step = 0, STEP // tokens.itemsize
    for i in range(0, len(tokens), step):
        total = zlib.crc32(np.ascontiguousarray(tokens[i : i + step]).data, total)
    return total
