"""Record what a measurement was made with (machine, versions, commit, command), and write JSON files atomically.

Imports only the standard library, because `gpu.py` uses it before the package is built; functions that need torch say
so. Records are meant to be committed, so they contain no path and no host name of this machine.
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
    """Write a record as JSON atomically: to a temporary file beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes a file that others cannot read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def scrub(text: str) -> str:
    """Return the text without colors, URLs and this machine's folders; paths in the checkout become relative."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\w+://\S+", "<address>", text)
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return re.sub(r"(?<![\w.<])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])", ".../", text)


def command(words: list[str] | None = None) -> str:
    """Return a command (default: the running one) as text for a record, without the folder of the program."""
    program, *rest = words or [sys.executable, *sys.argv]
    return scrub(shlex.join([Path(program).name, *rest]))


def now() -> str:
    """Return the date and time in UTC as ISO 8601 text."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def first_line(*words: str) -> str | None:
    """Return the first line that a command prints, or None if it fails or prints nothing."""
    try:
        process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = process.stdout.strip().splitlines()
    return scrub(lines[0]) if process.returncode == 0 and lines else None


def commit() -> str | None:
    """Return the checkout's commit, followed by "+changes" if tracked files differ from it; None without git."""
    head = first_line("git", "rev-parse", "HEAD")
    return head and head + ("+changes" if first_line("git", "status", "--porcelain", "--untracked-files=no") else "")


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python, PACKAGES, the C++ compiler and nvcc; None for what is not installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["compiler"] = first_line("c++", "--version")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout.split()
        versions["nvcc"] = words[words.index("release") + 1].rstrip(",")
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        versions["nvcc"] = None
    return versions


def header(description: str) -> dict:
    """Return the fields that every result file begins with. Needs torch."""
    return {
        "what": description,
        "command": command(),
        "date": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": package_versions(),
    }


def machine() -> dict:
    """Describe the processor, the state of its memory and the first GPU. Needs torch; some fields need sid_kernels."""
    import torch

    description = {
        "processor": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": None,
        "memory": None,
        "gpu": None,
    }
    try:
        from sid_kernels.core import cpu, memory

        if cpu.unavailable() is None:
            description["instruction_set"] = cpu.instruction_set()
        description["memory"] = {
            "large_outputs_kept": memory.LEAST_BYTES < sys.maxsize,
            "free_bytes_in_pages_of_2_MiB": memory.free_in_large_pages(),
        }
    except ImportError:
        pass
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        description["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "cache_bytes": getattr(gpu, "L2_cache_size", None),
            "memory_bytes": gpu.total_memory,
            "driver": driver,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return description


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
