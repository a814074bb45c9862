"""What a measurement is filed with (machine, versions, commit, command), and how: a file is whole or not there.

Needs nothing but Python until a function that says so, because `gpu.py` uses it before the package is built. What
goes into a record is meant to be committed: no path of this machine and no host is in it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "triton", "liger-kernel", "numpy", "pillow", "pybind11", "cmake", "ninja", "pytest",
    "pytest-benchmark",
)  # fmt: skip


def write_json(path: Path, record: dict) -> None:
    """A temporary file beside `path`, flushed to the disk, then renamed onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's file is private; a result is not
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def scrub(text: str) -> str:
    """`text` without colors, addresses, and the folders of this machine: paths below the checkout become relative."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\w+://\S+", "<address>", text)
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return re.sub(r"(?<![\w.<])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])", ".../", text)


def command(words: list[str] | None = None) -> str:
    """A command as it is filed: the program by its name."""
    program, *rest = words or [sys.executable, *sys.argv]
    return scrub(shlex.join([Path(program).name, *rest]))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def first_line(*words: str) -> str | None:
    """The first line a program prints; None where it does not run."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return scrub(lines[0]) if done.returncode == 0 and lines else None


def commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it."""
    head = first_line("git", "rev-parse", "HEAD")
    return head and head + ("+changes" if first_line("git", "status", "--porcelain", "--untracked-files=no") else "")


def package_versions() -> dict[str, str | None]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["compiler"] = first_line("c++", "--version")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout.split()
        found["nvcc"] = words[words.index("release") + 1].rstrip(",")
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        found["nvcc"] = None
    return found


def header(what: str) -> dict:
    """What every file begins with. Needs torch."""
    return {
        "what": what,
        "command": command(),
        "date": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": package_versions(),
    }


def machine() -> dict:
    """The processor, its cores and caches, and the GPUs. Needs torch; the instruction set needs the package."""
    import torch

    found = {
        "processor": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": None,
        "gpu": None,
    }
    try:
        from sid_kernels.core import cpu

        if cpu.unavailable() is None:
            found["instruction_set"] = cpu.instruction_set()
    except ImportError:
        pass
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "cache_bytes": getattr(gpu, "L2_cache_size", None),
            "memory_bytes": gpu.total_memory,
            "driver": driver,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
