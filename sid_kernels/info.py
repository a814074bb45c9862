"""Print versions, which backends are usable here, and why the others are not: `python -m sid_kernels.info`."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .core import backends, cpu


def _version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe() -> list[tuple[str, str]]:
    """Return (name, state) of everything that decides which kernels run."""
    lines = [
        ("sid_kernels", __version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or torch.version.hip or 'none'})"),
        ("triton", _version("triton")),
        ("threads", str(torch.get_num_threads())),
    ]
    if torch.cuda.is_available():
        lines += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        state = "usable" if reason is None else f"not usable: {reason}"
        if name == "cpu" and reason is None:
            state += f" ({cpu.instruction_set()})"
        lines.append((f"backend {name}", state))
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            lines.append((f"auto on {device}", backends.automatic(device)))
    return lines


def main() -> int:
    """Print one line for each pair of `describe`, and return 0."""
    for name, state in describe():
        print(f"{name:20} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
