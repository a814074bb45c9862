"""Save and load the checkpoints of a run: last.pt, and previous.pt from the save before it.

They hold only tensors, numbers and text. Reading checks every checksum and uses `weights_only`, so that an untrusted
file runs no code.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from ..files import write_atomically

LAST, PREVIOUS = "last.pt", "previous.pt"
REPLACED = "last.pt.replaced"  # the last.pt of a folder whose run continued from another checkpoint
FIELDS = ("config", "epoch", "step", "network", "optimizers", "schedulers", "random", "sums", "metrics")


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write last.pt completely or not at all; the old last.pt becomes previous.pt. Raises OSError.

    This removes the temporary files of killed runs, so only one run may save to a folder at a time.
    """
    for temporary in folder.glob(f".{LAST}.*"):
        temporary.unlink(missing_ok=True)

    def keep_previous() -> None:
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # closing the archive after a failed write hides its OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(folder / LAST, write, before=keep_previous)


def has_checkpoint(folder: Path) -> bool:
    """Return whether the folder of a run holds a checkpoint."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def load_checkpoint(path: Path) -> dict:
    """Return the state in a checkpoint file, or in the last checkpoint of a run's folder.

    Raises ValueError if the file is missing, damaged or not a checkpoint; the message names an undamaged previous.pt.
    """
    file = path
    if path.is_dir():  # a run killed between the two renames of a save leaves only previous.pt
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
            state = read_checkpoint(previous)
        except ValueError:
            raise error from None
        offer = f"{previous}, of epoch {state['epoch']} step {state['step']}, is undamaged: resume from it instead"
        raise ValueError(f"{error}; {offer}") from error


def check_same(path: Path, saved: dict, own: dict, names: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` with different values in `saved`, read from `path`, and `own`."""
    for name in names:
        saved_value, own_value = saved.get(name), own[name]
        if saved_value == own_value:
            continue
        if name == "classes" and saved_value:  # name only the first class that differs
            first = len(os.path.commonprefix([saved_value, own_value]))
            name = f"class {first}"
            saved_value, own_value = (next(iter(classes[first:]), None) for classes in (saved_value, own_value))
        raise ValueError(f"{path}: saved by a run with {name} {saved_value!r}, not {own_value!r}")


def read_checkpoint(file: Path) -> dict:
    """Return the state in a checkpoint file. Raises ValueError if it is missing, damaged or not a checkpoint."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except Exception as error:  # a damaged archive raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not state.keys() >= set(FIELDS):
        raise ValueError(f"{file}: not a checkpoint of sid_trainer")
    return state
