"""Text for language models: bytes or characters as tokens, read in windows of a fixed length."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import nonempty_path
from .image_files import DataError
from .own import OwnData
from .seeds import ORDER, seeded_generator

TOKENS = ("bytes", "characters")
HELD_OUT = 0.1  # share of the text, at its end, that is the test split


class TokenWindows(NamedTuple):
    """A split of a text: its tokens (N,), unsigned integers, in memory or mapped from a file."""

    tokens: np.ndarray
    context: int  # tokens in a window, T


class TextData(OwnData):
    """Training and test text for the `Trainer`; `load_text` makes it.

    Attributes:
        classes: What each token stands for: a character, or the number of a byte.
        bytes_per_token: Bytes of the test text per token, to convert nats per token to bits per byte.
    """

    unit = "tokens"

    def __init__(self, train: TokenWindows, test: TokenWindows, classes: Sequence[str], bytes_per_token: float):
        self.train, self.test, self.classes = train, test, list(classes)
        self.image_size = (train.context,)
        self.bytes_per_token = bytes_per_token

    def make_batches(
        self, split: TokenWindows, batch_size: int, device: torch.device, shuffle: bool, workers: int = 0
    ) -> "TextBatches":
        return TextBatches(split, batch_size, device)


class TextBatches:
    """Batches of windows of a text, with the methods of `Batches`; sizes are numbers of tokens.

    Inputs are tokens (B, T), int64. Targets (B * T,) are the tokens that follow each of them. Tokens at the end of the
    text that fill no window are left out.
    """

    def __init__(self, split: TokenWindows, batch_size: int, device: torch.device):
        self.tokens, self.context = split
        self.batch_size, self.device = batch_size, device
        self.windows = len(self.tokens) // self.context - 1  # as many for every offset of an epoch

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    @property
    def count(self) -> int:
        """Number of tokens in all batches."""
        return self.windows * self.context

    def sizes(self) -> list[int]:
        """Return the number of tokens in each batch."""
        full, rest = divmod(self.windows, self.batch_size)
        return [size * self.context for size in [self.batch_size] * full + [rest] * (rest > 0)]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over (inputs, targets) of every batch, from the start of the text on."""
        return self.load(torch.arange(self.windows) * self.context)

    def shuffle(self, seed: int, epoch: int, crop: int, flip: bool, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch from batch `start` on, in an order and from an offset drawn for it.

        They depend on (seed, epoch) alone. `crop` and `flip` are not used.
        """
        generator = seeded_generator(seed, ORDER, epoch)
        offset = torch.randint(self.context, (), generator=generator)
        return self.load(torch.randperm(self.windows, generator=generator) * self.context + offset, start)

    def load(self, positions: Tensor, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over batches of the windows that begin at `positions` (N,), from batch `start` on."""
        offsets = np.arange(self.context + 1)
        for index in positions.split(self.batch_size)[start:]:
            windows = torch.from_numpy(self.tokens[index.numpy()[:, None] + offsets].astype(np.int64))
            windows = windows.to(self.device, non_blocking=True)
            yield windows[:, :-1], windows[:, 1:].flatten()


def load_text(path: str | os.PathLike | None, tokens: str = "bytes", context: int = 128) -> TextData:
    """Load a text file, or the .txt files of a folder in the order of their names; the last tenth is the test split.

    Args:
        tokens: "bytes" (256 tokens; a single file is mapped, not read) or "characters" (those of the text, UTF-8).
        context: Number of tokens in a window.

    Raises DataError for a missing, empty or too short text, and for one that is not UTF-8.
    """
    if tokens not in TOKENS:
        raise DataError(f"tokens must be one of {', '.join(TOKENS)}, not {tokens!r}")
    if path is None:
        raise DataError("path must be a text file or a folder of .txt files; none was given")
    root = nonempty_path(path, "path")
    files = sorted(root.glob("[!.]*.txt")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{root}: neither a text file nor a folder with .txt files")
    data = [np.memmap(file, np.uint8, "r") for file in files if file.stat().st_size]
    text = data[0] if len(data) == 1 else np.concatenate([*data, np.empty(0, np.uint8)])
    ids, classes = (text, [*map(str, range(256))]) if tokens == "bytes" else encode_characters(text, root)
    held_out = int(len(ids) * HELD_OUT)
    if held_out < 2 * context:
        needed = round(2 * context / HELD_OUT)
        raise DataError(f"{root}: {len(ids)} tokens are too few for a context of {context}; {needed} are needed")
    train, test = ids[:-held_out], ids[-held_out:]
    sizes = [len(character.encode()) for character in classes] if tokens == "characters" else [1] * len(classes)
    test_bytes = np.bincount(test, minlength=len(sizes)) @ np.array(sizes)
    return TextData(TokenWindows(train, context), TokenWindows(test, context), classes, float(test_bytes) / held_out)


def encode_characters(text: np.ndarray, path: Path) -> tuple[np.ndarray, list[str]]:
    """Convert bytes (N,) of UTF-8 to character numbers; return them and the characters in order. Raises DataError."""
    try:
        code_points = np.frombuffer(text.tobytes().decode().encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; use tokens 'bytes'") from error
    used, ids = np.unique(code_points, return_inverse=True)
    return ids.astype(np.uint32 if len(used) > 1 << 16 else np.uint16), [chr(code_point) for code_point in used]
