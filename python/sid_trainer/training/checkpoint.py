"""A run's checkpoints: last.pt and, from the save before it, previous.pt. They hold tensors, numbers and text only.

They are read with `weights_only`, so that a file from elsewhere runs no code, and only if every checksum is right.
"""

import itertools
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from ..files import write_atomically

LAST, PREVIOUS = "last.pt", "previous.pt"
FIELDS = ("config", "epoch", "step", "network", "optimizers", "schedulers", "random", "sums", "metrics")


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write last.pt completely or not at all; the file that was there becomes previous.pt.

    Temporary files that killed runs left are removed, so only one run may save in a folder at a time.
    """
    for temporary in folder.glob(f".{LAST}.*"):
        temporary.unlink(missing_ok=True)

    def keep_previous() -> None:
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # closing the archive after a failed write hides the first error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(folder / LAST, write, before=keep_previous)


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run's folder holds a checkpoint."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def load_checkpoint(path: Path) -> dict:
    """Return the state saved in a file, or in the last checkpoint of a run's folder.

    Raises ValueError with one line if the file is damaged or no checkpoint. If previous.pt is undamaged, the message
    offers it.
    """
    file = path
    if path.is_dir():  # a kill between two renames leaves previous.pt alone
        file = next((path / name for name in (LAST, PREVIOUS) if (path / name).exists()), path / LAST)
        if not file.exists():
            raise ValueError(f"{path}: holds no checkpoint ({LAST})")
    try:
        return read_checkpoint(file)
    except ValueError as error:
        previous = file.with_name(PREVIOUS)
        if previous == file:
            raise
        try:
            before = read_checkpoint(previous)
        except ValueError:
            raise error from None
        offer = f"{previous}, of epoch {before['epoch']} step {before['step']}, is whole: it can be given in its place"
        raise ValueError(f"{error}; {offer}") from error


def set_aside_damaged(folder: Path) -> Path | None:
    """Rename a damaged last.pt, so that no save turns it into previous.pt, and return its new name."""
    last = folder / LAST
    if not last.exists():
        return None
    try:
        read_checkpoint(last)
    except ValueError:
        names = (folder / f"{LAST}.damaged{'' if i == 1 else i}" for i in itertools.count(1))
        return last.rename(next(name for name in names if not name.exists()))
    return None


def check_same(path: Path, saved: dict, own: dict, names: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` that differs between what was saved at `path` and `own`."""
    for name in names:
        there, here = saved.get(name), own[name]
        if there == here:
            continue
        if name == "classes" and there:  # there may be hundreds
            first = len(os.path.commonprefix([there, here]))
            name = f"class {first}"
            there, here = (next(iter(classes[first:]), None) for classes in (there, here))
        raise ValueError(f"{path}: is of a run with {name} {there!r}, not {here!r}")


def read_checkpoint(file: Path) -> dict:
    """Return the state in a file. Raises ValueError if it is missing, damaged or no checkpoint."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except Exception as error:  # a damaged archive makes its readers raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: not a whole checkpoint ({reason})") from error
    if not isinstance(state, dict) or not state.keys() >= set(FIELDS):
        raise ValueError(f"{file}: not a checkpoint of a run of sid_trainer")
    return state
