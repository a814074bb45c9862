"""Text for language models: bytes, characters or byte pairs as tokens, read in windows of a fixed length."""

import hashlib
import json
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
from .token_cache import EncodedText, load_encoded, save_encoded

TOKENS = ("bytes", "characters", "bpe")
HELD_OUT = 0.1  # share of the text, at its end, that is the test split
ENCODING_VERSION = 1  # part of the names of cached tokens; increase it whenever a text gives other tokens


class TokenWindows(NamedTuple):
    """A split of a text: its tokens (N,), unsigned integers, in memory or mapped from a file."""

    tokens: np.ndarray
    context: int  # tokens in a window, T


class TextData(OwnData):
    """Training and test text for the `Trainer`; `load_text` makes it.

    Attributes:
        classes: What each token stands for: a character, the number of a byte, or a name of merged bytes.
        bytes_per_token: Bytes of the test text per token, to convert nats per token to bits per byte.
        tokenizer: The tokenizer of "bpe" or a file, as the package tokenizers writes it; otherwise None.
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
    path: str | os.PathLike | None, tokens: str = "bytes", context: int = 128, vocabulary: int = 4096, *,
    cache: str | os.PathLike | None = None,
) -> TextData:  # fmt: skip
    """Load a text file, or the .txt files of a folder in the order of their names; the last tenth is the test split.

    Args:
        tokens: "bytes" (256 tokens; a single file is mapped, not read), "characters" (those of the text, UTF-8), or
            "bpe" (byte pairs that are frequent in the training split are merged, by the package tokenizers), or a file
            of a byte-level tokenizer, FILE.json, as that package and Hugging Face's models have it.
        context: Number of tokens in a window.
        vocabulary: Number of tokens of "bpe", at least 257.
        cache: A folder for tokens other than bytes, which are then mapped from there; None keeps them in memory. A text
            with another size or time of change is encoded again.

    Raises DataError for a missing, empty or too short text, and for one that is not UTF-8.
    """
    if tokens not in TOKENS and not tokens.endswith(".json"):
        raise DataError(f"tokens must be one of {', '.join(TOKENS)}, or a tokenizer file (.json), not {tokens!r}")
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
    if tokens == "bytes":
        text = read_bytes(files)
        held_out = int(len(text) * HELD_OUT)
        train, test = np.split(text, [len(text) - held_out])
        encoded = EncodedText(train, test, [*map(str, range(256))], 1.0)
    elif cache is None:
        encoded = encode_text(decode(read_bytes(files), root), tokens, vocabulary)
    else:
        encoded = encode_cached(root, files, tokens, vocabulary, nonempty_path(cache, "cache"))
    train, test, classes, bytes_per_token, tokenizer = encoded
    if len(test) < 2 * context or len(train) < 2 * context:
        needed, count = round(2 * context / HELD_OUT), len(train) + len(test)
        raise DataError(f"{root}: {count} tokens are too few for a context of {context}; {needed} are needed")
    return TextData(TokenWindows(train, context), TokenWindows(test, context), classes, bytes_per_token, tokenizer)


def read_bytes(files: Sequence[Path]) -> np.ndarray:
    """Return the bytes (N,) of all files; those of a single file are mapped, not read."""
    data = [np.memmap(file, np.uint8, "r") for file in files if file.stat().st_size]
    return data[0] if len(data) == 1 else np.concatenate([*data, np.empty(0, np.uint8)])


def encode_cached(root: Path, files: Sequence[Path], tokens: str, vocabulary: int, cache: Path) -> EncodedText:
    """Return the tokens of a text, mapped from the cache; encode it first if they are not there."""
    settings: list = [ENCODING_VERSION, tokens]
    if tokens == "bpe":
        from tokenizers import __version__

        settings += [vocabulary, __version__]
    elif tokens not in TOKENS:
        settings.append(hashlib.sha256(read_tokenizer(tokens).encode()).hexdigest())
    stats = [(os.fspath(file.resolve()), file.stat()) for file in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    text_hash, settings_hash = (
        hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in (listing, settings)
    )
    path_hash = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    file = cache / f"{path_hash}-{settings_hash}-{text_hash}.tokens"
    if (encoded := load_encoded(file)) is None:
        encoded = encode_text(decode(read_bytes(files), root), tokens, vocabulary)
        if save_encoded(file, encoded):
            for stale in set(cache.glob(f"{path_hash}-{settings_hash}-*.tokens")) - {file}:
                stale.unlink(missing_ok=True)
            encoded = load_encoded(file) or encoded  # mapped, also in the first run
    return encoded


def encode_text(text: str, tokens: str, vocabulary: int) -> EncodedText:
    """Return the training and test tokens of a text, divided as `load_text` describes."""
    if tokens == "characters":
        ids, classes = encode_characters(text)
        train, test = np.split(ids, [len(ids) - int(len(ids) * HELD_OUT)])
        sizes = np.array([len(character.encode()) for character in classes] or [0])
        test_bytes, tokenizer = int(np.bincount(test, minlength=len(sizes)) @ sizes), None
    else:
        split = len(text) - int(len(text) * HELD_OUT)
        parts = text[:split], text[split:]
        model = learn_pairs(parts[0], vocabulary) if tokens == "bpe" else load_tokenizer(tokens)
        count = 1 + max(model.get_vocab().values())
        classes = [model.id_to_token(i) or "" for i in range(count)]
        dtype = np.uint32 if count > 1 << 16 else np.uint16
        train, test = (np.array(model.encode(part, add_special_tokens=False).ids, dtype) for part in parts)
        test_bytes, tokenizer = len(parts[1].encode()), model.to_str()
    return EncodedText(train, test, classes, test_bytes / max(1, len(test)), tokenizer)


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


def learn_pairs(text: str, vocabulary: int) -> Any:
    """Return a tokenizer of byte-pair encoding learned from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def read_tokenizer(file: str) -> str:
    """Return the text of a tokenizer file. Raises DataError if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tokens must be a readable tokenizer file, not {file!r} ({error})") from error


def load_tokenizer(file: str) -> Any:
    """Return the tokenizer in a file. Raises DataError if it is none, or none whose tokens stand for bytes."""
    from tokenizers import Tokenizer

    text = read_tokenizer(file)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare exceptions
        raise DataError(f"tokens must be a tokenizer file, not {file!r} ({error})") from error
    if '"ByteLevel"' not in json.dumps(json.loads(text)["decoder"]):
        raise DataError(f"tokens must be the file of a byte-level tokenizer, but {file!r} has another decoder")
    return tokenizer
