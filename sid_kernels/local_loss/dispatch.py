"""Runs a problem on the backend asked for, or on the one that `auto` takes."""

from __future__ import annotations

from collections.abc import Callable

from ..core import backends
from ..core.checks import debug_enabled
from . import cpu, cuda, reference, triton_launch
from .problem import Problem, Result, check_values

_RUN: dict[str, Callable[[Problem], Result]] = {
    "reference": reference.run,
    "cpu": cpu.run,
    "cuda": cuda.run,
    "triton": triton_launch.run,
}


def run(problem: Problem, backend: str = "auto") -> Result:
    """Return loss, belief and gradient of `problem`, computed by `backend`."""
    name = backends.choose(backend, problem.logits)
    on_cpu = problem.logits.device.type == "cpu"
    # The cpu backend checks labels itself, before it writes; alpha given as a tensor is checked here.
    if (on_cpu and (name != "cpu" or type(problem.alpha) is not float)) or (not on_cpu and debug_enabled()):
        check_values(problem)
    return _RUN[name](problem)
