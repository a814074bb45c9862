"""A run's checkpoints: `last.pt` and, from the save before it, `previous.pt`. Plain tensors, numbers and words.

They are read with `weights_only`, so a file from elsewhere runs no code, and only when every byte's checksum is right.
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
    """Write last.pt, whole or not at all; what was there becomes previous.pt.

    What killed runs left of writing it is removed: no two runs save in one folder at a time.
    """
    for half in folder.glob(f".{LAST}.*"):
        half.unlink(missing_ok=True)

    def keep_the_one_before() -> None:
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # after a failed write the archive cannot be closed, which hides what had failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(folder / LAST, write, before=keep_the_one_before)


def load_checkpoint(place: Path) -> dict:
    """The state saved in a file, or in a run's folder (a kill between two renames can leave previous.pt alone there).

    Raises ValueError, in one line, for a file that is damaged or is no checkpoint; where the one before it is whole,
    the message offers it.
    """
    file = place
    if place.is_dir():
        file = next((place / name for name in (LAST, PREVIOUS) if (place / name).exists()), None)
        if file is None:
            raise ValueError(f"{place}: holds no checkpoint ({LAST})")
    try:
        return read(file)
    except ValueError as error:
        previous = file.with_name(PREVIOUS)
        try:
            before = read(previous) if previous != file else None
        except ValueError:
            before = None
        if before is None:
            raise
        offer = f"{previous}, of epoch {before['epoch']} step {before['step']}, is whole: it can be given in its place"
        raise ValueError(f"{error}; {offer}") from error


def set_aside_damaged(folder: Path) -> Path | None:
    """Rename a last.pt that is not whole, so that no save makes it the one before; the new name, if it was."""
    last = folder / LAST
    if not last.exists():
        return None
    try:
        read(last)
    except ValueError:
        names = (folder / f"{LAST}.damaged{'' if i == 1 else i}" for i in itertools.count(1))
        return last.rename(next(name for name in names if not name.exists()))
    return None


def check_same(place: Path, saved: dict, own: dict, names: Iterable[str]) -> None:
    """Raises ValueError for the first of `names` that is another in what was saved at `place` than here."""
    for name in names:
        there, here = saved.get(name), own[name]
        if there == here:
            continue
        if name == "classes" and there:  # there may be hundreds
            first = len(os.path.commonprefix([there, here]))
            name = f"class {first}"
            there, here = (next(iter(classes[first:]), None) for classes in (there, here))
        raise ValueError(f"{place}: is of a run with {name} {there!r}, not {here!r}")


def read(file: Path) -> dict:
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except Exception as error:  # what a damaged archive makes its readers raise is of many kinds
        raise ValueError(
            f"{file}: not a whole checkpoint ({str(error).splitlines()[0] or type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= set(FIELDS):
        raise ValueError(f"{file}: not a checkpoint of a run of sid_trainer")
    return state
