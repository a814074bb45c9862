"""How a `Problem` is handed to compiled code: outputs are allocated, everything else becomes integers."""

from __future__ import annotations

import torch

from ..core.native import matrix
from .problem import Problem, Result, belief_memory

REDUCTION_CODES = {"none": 0, "mean": 1, "sum": 2}
_new = torch.empty_strided  # half the overhead of torch.empty


def pack(problem: Problem) -> tuple[Result, tuple]:
    """The result to be filled, and the arguments of `local_loss` in csrc/bindings/arguments.h."""
    z, prior, labels, soft, alpha, reverse, smoothing, ignore_index, reduction, out, need_grad, *_ = problem
    rows, classes = z.shape
    device, dtype = z.device, z.dtype
    shape, strides = (rows, classes), (classes, 1)
    belief = belief_memory(problem)
    if not need_grad:
        dlogits = None
    elif out is not None:
        dlogits = out
    else:
        dlogits = _new(shape, strides, dtype=dtype, device=device)
    shape, strides = ((rows,), (1,)) if reduction == "none" else ((), ())
    loss = _new(shape, strides, dtype=torch.float32, device=device)
    fidelity = _new(shape, strides, dtype=torch.float32, device=device)
    consistency = _new(shape, strides, dtype=torch.float32, device=device)
    tensor_alpha = type(alpha) is not float
    arguments = (
        rows,
        classes,
        matrix(z),
        matrix(prior),
        0 if labels is None else labels.data_ptr(),
        matrix(soft),
        alpha.data_ptr() if tensor_alpha else 0,
        alpha.dim() if tensor_alpha else 0,
        0.0 if tensor_alpha else alpha,
        smoothing,
        ignore_index,
        reverse,
        REDUCTION_CODES[reduction],
        matrix(belief),
        matrix(dlogits),
        loss.data_ptr(),
        fidelity.data_ptr(),
        consistency.data_ptr(),
    )
    return Result(loss, fidelity, consistency, belief, dlogits), arguments
