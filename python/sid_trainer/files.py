"""Name the files of a run, and write a file completely or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes the file private
            before()
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the name of the temporary file


def current_umask() -> int:
    """Return this process's umask, the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
