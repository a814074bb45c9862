"""The compiled CPU kernels: whether they can be used, and for which instruction set."""

from __future__ import annotations

from .native import load

compiled, _reason = load("_C")


def unavailable() -> str | None:
    """Return why the CPU kernels cannot be used, or None if they can."""
    return _reason


def instruction_set() -> str:
    """Return "avx512", "avx2" or "baseline"; SID_KERNELS_CPU in the environment at import lowers it."""
    return compiled.instruction_set()
