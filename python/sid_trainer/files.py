"""Writing files that are either whole or not there, whatever interrupts the writing."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Files in a run's folder, besides its checkpoints.
CONFIG = "config.json"
METRICS = "metrics.jsonl"
PIPELINE = "pipeline.json"  # how the processes spent the last epoch
PICTURE = "stages.png"


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], before: Callable[[], object] = lambda: None
) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, call `before`, then rename it onto `path`.

    Raises OSError, which names `path`; it is then as it was, and the temporary file is gone.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp's file is private; an ordinary one is not
            before()
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the file meant, not the temporary one


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
