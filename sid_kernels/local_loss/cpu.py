"""The CPU backend: C++ kernels for AVX-512, AVX2 and a baseline, chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import cpu, memory
from ..core.checks import label_error
from ..core.native import pack_spec
from ..core.options import DEFAULTS
from .pack import pack
from .problem import LocalLossOutputs, LocalLossProblem


def run(problem: LocalLossProblem) -> LocalLossOutputs:
    """Return loss, belief and gradient of a problem on a CPU.

    Raises:
        IndexError: a label out of range; then nothing was written.
    """
    outputs, arguments = pack(problem)
    bad = cpu.compiled.local_loss(*arguments, torch.get_num_threads())
    if bad is not None:
        row, label = bad
        raise label_error(row, label, problem.logits.shape[1], problem.spec.options.ignore_index)
    return outputs


_PLAIN = (Tensor, torch.nn.Parameter)
_float32, _int64, _like = torch.float32, torch.int64, torch.empty_like
_CPU = torch.device("cpu")
_SCALAR = torch.empty((), dtype=torch.float32, device=_CPU)


def run_ordinary(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, out: Tensor | None = None
) -> LocalLossOutputs | None:
    """Run the ordinary call of a training step without the general checks; return None for any other call.

    An ordinary call has contiguous float32 logits and prior (N, C), int64 labels, a float alpha, default options, and
    `out` (N, C) contiguous, the logits or memory of its own. At (128, 10) the general checks take longer than the
    kernel. Any other call takes the general path, whose errors name the argument.
    """
    if not (
        cpu.compiled is not None
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
    try:
        shape = logits.shape
        if len(shape) != 2 or prior.shape != shape:
            return None
        rows, classes = shape
        if not classes or target.shape != (rows,) or not (out is None or _takes(out, logits, prior, target)):
            return None
    except RuntimeError:  # a nested tensor
        return None
    z, q = logits.data_ptr(), prior.data_ptr()
    if not z or not q:  # implied zeros, or no rows
        return None
    if 4 * rows * classes < memory.LEAST_BYTES:
        belief, dlogits = _like(prior), _like(prior) if out is None else out
    else:
        belief = memory.empty_matrix(shape, _float32, _CPU)
        dlogits = memory.empty_matrix(shape, _float32, _CPU) if out is None else out
    loss, fidelity, consistency = _like(_SCALAR), _like(_SCALAR), _like(_SCALAR)
    bad = cpu.compiled.local_loss(
        rows,
        classes,
        (z, classes, 0),
        (q, classes, 0),
        pack_spec(target, None, alpha, DEFAULTS),
        (
            loss.data_ptr(),
            (belief.data_ptr(), classes, 0),
            fidelity.data_ptr(),
            consistency.data_ptr(),
            (dlogits.data_ptr(), classes, 0),
        ),
        torch.get_num_threads(),
    )
    if bad is not None:
        row, label = bad
        raise label_error(row, label, classes, DEFAULTS.ignore_index)
    return LocalLossOutputs(loss, belief, fidelity, consistency, dlogits)


def _takes(out: Tensor, logits: Tensor, prior: Tensor, target: Tensor) -> bool:
    """Return whether dlogits can go to `out`, (N, C): it is the logits, or contiguous, and its storage has no input."""
    storage = _storage(out) if type(out) in _PLAIN else 0
    if storage in (0, _storage(prior), _storage(target)):
        return False
    if out is logits:
        return True
    if not (type(out) is Tensor and out.dtype is _float32 and out.is_cpu and out.shape == logits.shape):
        return False
    return out.is_contiguous() and storage != _storage(logits)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
