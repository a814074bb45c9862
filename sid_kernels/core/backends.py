"""List the backends, tell which can be used here and why not, and choose the one that `backend="auto"` takes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu, cuda, triton

# Each backend and the device types its kernels run on.
BACKENDS: dict[str, tuple[str, ...]] = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
}

# What `auto` takes: the first row whose device and least number of elements (N * C) fit and whose backend is usable.
# cpu before reference: measured faster at every size from (1, 1) to (2048, 32000), bench/results.
# cuda before triton: 323 and 590 us at (65536, 1000), 662 and 1056 us at (8192, 32000), on an H200 (docs/results.md).
AUTO = (
    ("cpu", 0, "cpu"),
    ("cuda", 0, "cuda"),
    ("cuda", 0, "triton"),
)


@functools.cache
def unavailable(name: str) -> str | None:
    """Return why backend `name` cannot be used in this process, or None if it can; probed once."""
    probes = {"cpu": cpu.unavailable, "cuda": cuda.unavailable, "triton": triton.unavailable}
    return probes[name]() if name in probes else None


def automatic(device: str, elements: int = 1 << 30) -> str:
    """Return the backend that `auto` takes for `elements` = N * C on a device type, "cpu" or "cuda"."""
    for place, least, name in AUTO:
        if place == device and elements >= least and unavailable(name) is None:
            return name
    return "reference"


@functools.cache
def _warn_of_reference(device: str) -> None:
    """Warn that `auto` takes the reference backend and say why, once per device type."""
    reasons = [f"{name}: {unavailable(name)}" for place, _, name in AUTO if place == device]
    message = f"sid_kernels computes on {device} with its slow backend 'reference', since no other can be used here"
    warnings.warn(f"{message} ({'; '.join(reasons)})", RuntimeWarning, stacklevel=4)


def check_name(backend: str) -> None:
    """Raise ValueError if `backend` names no backend."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it must be 'auto' or one of {tuple(BACKENDS)}")


def choose(backend: str, logits: Tensor) -> str:
    """Return the backend for `logits`: the one asked for, or the one `auto` takes.

    Raises:
        TypeError: float64 logits and a backend other than "reference".
        ValueError: an unknown backend, or one that does not run on the device of the logits.
        RuntimeError: the backend cannot be used in this process.
    """
    double = logits.dtype is torch.float64
    device = logits.device.type
    if backend == "auto":
        name = "reference" if double else automatic(device, logits.numel())
        if name == "reference" and not double:
            _warn_of_reference(device)
        return name
    check_name(backend)
    if double and backend != "reference":
        raise TypeError(f"logits has dtype torch.float64, which only backend 'reference' takes; backend is {backend!r}")
    if (reason := unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot be used here: {reason}")
    devices = ("cpu",) if backend == "triton" and triton.INTERPRETING else BACKENDS[backend]
    if backend != "reference" and device not in devices:
        raise ValueError(f"logits is on {logits.device}; backend {backend!r} takes tensors on {devices[0]}")
    return backend


def in_place_scaling(gradient: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the kernel that multiplies `gradient` (N, C) in place by a float32 tensor, () or (N,), or None."""
    if gradient.is_cuda and gradient.dtype is not torch.float64:
        for name, scale_ in (("cuda", cuda.scale_), ("triton", triton.scale_)):
            if unavailable(name) is None:
                return scale_
    return None
