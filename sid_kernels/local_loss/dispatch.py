"""Run a problem on the requested backend, or on the one that `auto` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core import backends
from ..core.checks import check_values, debug_enabled
from . import cpu, cuda, reference, triton_launch
from .problem import LocalLossOutputs, LocalLossProblem

_RUN: dict[str, Callable[[LocalLossProblem], LocalLossOutputs]] = {
    "reference": reference.run,
    "cpu": cpu.run,
    "cuda": cuda.run,
    "triton": triton_launch.run,
}


def run(problem: LocalLossProblem, backend: str = "auto") -> LocalLossOutputs:
    """Return loss, belief and gradient of `problem`, computed by `backend`.

    Raises:
        TypeError, ValueError, RuntimeError: as `core.backends.choose`, or alpha as a tensor outside [0, 1].
        IndexError: a label out of range, on a CPU or with SID_KERNELS_DEBUG=1.
    """
    name = backends.choose(backend, problem.logits)
    on_cpu = problem.logits.device.type == "cpu"
    # The cpu backend checks labels itself, before it writes; alpha given as a tensor is checked here.
    if (on_cpu and (name != "cpu" or type(problem.spec.alpha) is not float)) or (not on_cpu and debug_enabled()):
        check_values(problem.spec, problem.logits.shape[1])
    return _RUN[name](problem)


def run_shaped(problem: LocalLossProblem, backend: str, shape: torch.Size) -> LocalLossOutputs:
    """Return what `run` gives in the shape (..., C) of the caller's logits; `problem.out` keeps its own shape."""
    outputs = run(problem, backend)
    if len(shape) == 2:
        return outputs
    loss, belief, fidelity, consistency, dlogits = outputs
    if problem.spec.options.reduction == "none":
        loss, fidelity, consistency = (x.view(shape[:-1]) for x in (loss, fidelity, consistency))
    belief = None if belief is None else belief.view(shape)
    dlogits = dlogits if dlogits is None or problem.out is not None else dlogits.view(shape)
    return LocalLossOutputs(loss, belief, fidelity, consistency, dlogits)
