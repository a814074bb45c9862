"""The CPU backend: C++ kernels for AVX-512, AVX2 and a baseline, chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import cpu
from ..core.checks import label_error
from .pack import pack
from .problem import Problem, Result


def run(problem: Problem) -> Result:
    result, arguments = pack(problem)
    bad = cpu.compiled.local_loss(*arguments, torch.get_num_threads())
    if bad is not None:
        raise label_error(*bad, problem.logits.shape[1], problem.ignore_index)
    return result


_PLAIN = (Tensor, torch.nn.Parameter)
_float32, _int64, _like = torch.float32, torch.int64, torch.empty_like
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")
_NONE = (0, 0, 0)


def run_ordinary(logits: Tensor, prior: Tensor, target: Tensor, alpha: float) -> Result | None:
    """The call a training step makes (contiguous float32 (N, C), labels, all options at their defaults), or None.

    It gives what `run` gives. Whatever is not just so goes the general way, where it is checked and named; here
    nothing is but the few facts that make the checks unnecessary, because at (128, 10) they cost more than the kernel.
    """
    if not (
        cpu.unavailable() is None
        and type(logits) in _PLAIN
        and type(prior) is Tensor
        and type(target) is Tensor
        and type(alpha) is float
        and 0.0 <= alpha <= 1.0
        and logits.dtype is _float32
        and prior.dtype is _float32
        and target.dtype is _int64
        and logits.is_cpu
        and target.is_cpu
        and prior.is_cpu
        and logits.is_contiguous()
        and prior.is_contiguous()
        and target.is_contiguous()
    ):
        return None
    shape = logits.shape
    if len(shape) != 2 or prior.shape != shape or target.shape != shape[:1] or not shape[1]:
        return None
    rows, classes = shape
    belief, dlogits = _like(prior), _like(prior)
    loss, fidelity, consistency = _like(_SCALAR), _like(_SCALAR), _like(_SCALAR)
    bad = cpu.compiled.local_loss(
        rows, classes, (logits.data_ptr(), classes, 0), (prior.data_ptr(), classes, 0), target.data_ptr(), _NONE,
        0, 0, alpha, 0.0, -100, False, 1, (belief.data_ptr(), classes, 0), (dlogits.data_ptr(), classes, 0),
        loss.data_ptr(), fidelity.data_ptr(), consistency.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if bad is not None:
        raise label_error(*bad, classes, -100)
    return Result(loss, fidelity, consistency, belief, dlogits)
