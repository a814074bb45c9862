"""Which backend runs a problem: the table, and the reasons why one cannot be used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from . import cpu, cuda, reference
from . import triton_launch as triton_kernels
from .problem import Problem, Result, check_values, debug

# name: (module, devices its kernels run on)
BACKENDS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "reference": (reference, ("cpu", "cuda")),
    "cpu": (cpu, ("cpu",)),
    "cuda": (cuda, ("cuda",)),
    "triton": (triton_kernels, ("cuda",)),
}

# What `auto` takes: the first row whose device and least number of elements (N * C) fit and that is usable.
# cpu before reference: measured faster at every size from (1, 1) to (2048, 32000), bench/results.
# cuda before triton: by predicted traffic and launches only, not measured yet.
AUTO = (
    ("cpu", 0, "cpu"),
    ("cuda", 0, "cuda"),
    ("cuda", 0, "triton"),
)


@functools.cache
def unavailable(name: str) -> str | None:
    """Why backend `name` cannot be used in this process; None if it can. Probed once."""
    return BACKENDS[name][0].unavailable()


def run(problem: Problem, backend: str = "auto") -> Result:
    """Run `problem` on the backend asked for, or on the one the table gives."""
    name = _choose(problem, backend)
    on_cpu = problem.logits.device.type == "cpu"
    # The cpu backend checks labels itself, before it writes; alpha given as a tensor is checked here.
    if (on_cpu and (name != "cpu" or type(problem.alpha) is not float)) or (not on_cpu and debug()):
        check_values(problem)
    return _runner(name)(problem)


def automatic(device: str, elements: int = 1 << 30) -> str:
    """The backend `auto` takes for `elements` = N * C on a device type."""
    for where, least, name in AUTO:
        if where == device and elements >= least and unavailable(name) is None:
            return name
    return "reference"


@functools.cache
def _runner(name: str) -> Callable[[Problem], Result]:
    return BACKENDS[name][0].run


def _choose(problem: Problem, backend: str) -> str:
    device, dtype = problem.logits.device.type, problem.logits.dtype
    if backend == "auto":
        if dtype is torch.float64:
            return "reference"
        return automatic(device, problem.logits.numel())
    check_name(backend)
    if dtype is torch.float64 and backend != "reference":
        raise TypeError(f"logits has dtype torch.float64, which only backend 'reference' takes; backend is {backend!r}")
    if (reason := unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot be used here: {reason}")
    devices = BACKENDS[backend][1]
    if backend == "triton" and triton_kernels.INTERPRETING:
        devices = ("cpu",)
    if backend != "reference" and device not in devices:
        raise ValueError(f"logits is on {problem.logits.device}; backend {backend!r} takes tensors on {devices[0]}")
    return backend


def check_name(backend: str) -> None:
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it must be 'auto' or one of {tuple(BACKENDS)}")


def scale_in_place(dlogits):
    """The kernel that multiplies a gradient (N, C) in place by a float32 tensor () or (N,); None: there is none."""
    if dlogits.is_cuda and dlogits.dtype is not torch.float64:
        for name in ("cuda", "triton"):
            if unavailable(name) is None:
                return BACKENDS[name][0].scale_
    return None
