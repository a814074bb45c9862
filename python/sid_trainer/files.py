"""Name the files of a run, and write a file completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# Files in the folder of a run besides its checkpoints.
CONFIG = "config.json"
METRICS = "metrics.jsonl"
PIPELINE = "pipeline.json"  # how the ranks of a pipeline spent the last epoch
PICTURE = "stages.png"
EXITS = "exit.png"  # accuracy and operations of images that leave the cascade early


def nonempty_path(path: str | os.PathLike, name: str) -> Path:
    """Return `path`, the argument `name`. Raises ValueError if it is "", which pathlib takes for the current folder."""
    if not os.fspath(path):
        raise ValueError(f"{name} must not be empty")
    return Path(path)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], before: Callable[[], object] = lambda: None
) -> None:
    """Write a file such that an interruption leaves either the old content or the new.

    `write` fills a temporary file beside `path`, which is flushed to the disk. Then `before` is called, and the
    temporary file is renamed to `path`.

    Raises OSError that names `path` if this fails. `path` is unchanged then, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            before()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the name of the temporary file
