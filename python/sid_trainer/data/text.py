"""Text for language models: bytes, characters or byte pairs as tokens, read in windows of a fixed length."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import nonempty_path
from .image_files import DataError
from .own import OwnData
from .seeds import ORDER, seeded_generator

TOKENS = ("bytes", "characters", "bpe")
HELD_OUT = 0.1  # share of the text, at its end, that is the test split


class TokenWindows(NamedTuple):
    """A split of a text: its tokens (N,), unsigned integers, in memory or mapped from a file."""

    tokens: np.ndarray
    context: int  # tokens in a window, T


class TextData(OwnData):
    """Training and test text for the `Trainer`; `load_text` makes it.

    Attributes:
        classes: What each token stands for: a character, the number of a byte, or a name of merged bytes.
        bytes_per_token: Bytes of the test text per token, to convert nats per token to bits per byte.
        tokenizer: The tokenizer of "bpe" as text, as the package tokenizers writes it; otherwise None.
    """

    unit = "tokens"

    def __init__(
        self, train: TokenWindows, test: TokenWindows, classes: Sequence[str], bytes_per_token: float,
        tokenizer: str | None = None,
    ):  # fmt: skip
        self.train, self.test, self.classes = train, test, list(classes)
        self.image_size = (train.context,)
        self.bytes_per_token, self.tokenizer = bytes_per_token, tokenizer

    def make_batches(
        self, split: TokenWindows, batch_size: int, device: torch.device, shuffle: bool, workers: int = 0
    ) -> "TextBatches":
        return TextBatches(split, batch_size, device)


class TextBatches:
    """Batches of windows of a text, with the methods of `Batches`; sizes are numbers of tokens.

    Inputs are tokens (B, T), int64. Targets (B * T,) are the tokens that follow each of them. Tokens at the end of the
    text that fill no window are left out. With the share (r, n) of `Batches`, a batch has every n-th of its windows,
    from the r-th on.
    """

    share = (0, 1)

    def __init__(self, split: TokenWindows, batch_size: int, device: torch.device):
        self.tokens, self.context = split
        self.batch_size, self.device = batch_size, device
        self.windows = len(self.tokens) // self.context - 1  # as many for every offset of an epoch

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    @property
    def count(self) -> int:
        """Number of tokens in all batches, before they are shared."""
        return self.windows * self.context

    def sizes(self) -> list[int]:
        """Return the number of tokens in each batch, before it is shared."""
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
        offsets, (first, stride) = np.arange(self.context + 1), self.share
        for index in positions.split(self.batch_size)[start:]:
            starts = index.numpy()[first::stride, None]
            windows = torch.from_numpy(self.tokens[starts + offsets].astype(np.int64))
            windows = windows.to(self.device, non_blocking=True)
            yield windows[:, :-1], windows[:, 1:].flatten()


def load_text(
    path: str | os.PathLike | None, tokens: str = "bytes", context: int = 128, vocabulary: int = 4096
) -> TextData:
    """Load a text file, or the .txt files of a folder in the order of their names; the last tenth is the test split.

    Args:
        tokens: "bytes" (256 tokens; a single file is mapped, not read), "characters" (those of the text, UTF-8), or
            "bpe" (byte pairs that are frequent in the training split are merged, by the package tokenizers).
        context: Number of tokens in a window.
        vocabulary: Number of tokens of "bpe", at least 257.

    Raises DataError for a missing, empty or too short text, and for one that is not UTF-8.
    """
    if tokens not in TOKENS:
        raise DataError(f"tokens must be one of {', '.join(TOKENS)}, not {tokens!r}")
    if path is None:
        raise DataError("path must be a text file or a folder of .txt files; none was given")
    if context < 1:
        raise DataError(f"context must be at least 1, not {context}")
    if vocabulary <= 256:
        raise DataError(f"vocabulary must be more than the 256 bytes, not {vocabulary}")
    root = nonempty_path(path, "path")
    files = sorted(root.glob("[!.]*.txt")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{root}: neither a text file nor a folder with .txt files")
    data = [np.memmap(file, np.uint8, "r") for file in files if file.stat().st_size]
    text = data[0] if len(data) == 1 else np.concatenate([*data, np.empty(0, np.uint8)])
    tokenizer = None
    if tokens == "bpe":
        train, test, tokenizer = encode_pairs(decode(text, root), vocabulary)
        classes = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        sizes = [len(token) for token in classes]  # a character of a token stands for a byte
    else:
        ids, classes = (text, [*map(str, range(256))]) if tokens == "bytes" else encode_characters(decode(text, root))
        train, test = np.split(ids, [len(ids) - int(len(ids) * HELD_OUT)])
        sizes = [len(character.encode()) for character in classes]
    if len(test) < 2 * context or len(train) < 2 * context:
        needed, count = round(2 * context / HELD_OUT), len(train) + len(test)
        raise DataError(f"{root}: {count} tokens are too few for a context of {context}; {needed} are needed")
    bytes_per_token = 1.0
    if tokens != "bytes":  # whose file may be larger than memory
        bytes_per_token = float(np.bincount(test, minlength=len(sizes)) @ np.array(sizes)) / len(test)
    windows = TokenWindows(train, context), TokenWindows(test, context)
    return TextData(*windows, classes, bytes_per_token, tokenizer and tokenizer.to_str())


def decode(text: np.ndarray, path: Path) -> str:
    """Decode bytes (N,) of UTF-8 to characters. Raises DataError for other bytes."""
    try:
        return text.tobytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; use tokens 'bytes'") from error


def encode_characters(text: str) -> tuple[np.ndarray, list[str]]:
    """Return the characters of a text as numbers (N,), and all different characters in order."""
    used, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    return ids.astype(np.uint32 if len(used) > 1 << 16 else np.uint16), [chr(code_point) for code_point in used]


def encode_pairs(text: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return training and test tokens (N,) of byte-pair encoding, and the tokenizer, learned from the training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    held_out = int(len(text) * HELD_OUT)
    parts = text[: len(text) - held_out], text[len(text) - held_out :]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(parts[0].splitlines(keepends=True), trainer)
    dtype = np.uint32 if vocabulary > 1 << 16 else np.uint16
    train, test = (np.array(tokenizer.encode(part).ids, dtype) for part in parts)
    return train, test, tokenizer
