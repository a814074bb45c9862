"""How a `Problem` is handed to compiled code: outputs are allocated, everything else becomes integers."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from .problem import Problem, Result, belief_memory

_PACKAGE = "sid_kernels"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTION_CODES = {"none": 0, "mean": 1, "sum": 2}
_NOTHING = (0, 0, 0)
_new = torch.empty_strided  # half the overhead of torch.empty


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module sid_kernels.NAME, or why there is none."""
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}"), None
    except ModuleNotFoundError:
        return None, f"the compiled module {_PACKAGE}.{name} was not built (no working compiler at installation?)"
    except ImportError as error:
        return None, f"the compiled module {_PACKAGE}.{name} does not load: {error}"


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
        _NOTHING if prior is None else matrix(prior),
        0 if labels is None else labels.data_ptr(),
        _NOTHING if soft is None else matrix(soft),
        alpha.data_ptr() if tensor_alpha else 0,
        alpha.dim() if tensor_alpha else 0,
        0.0 if tensor_alpha else alpha,
        smoothing,
        ignore_index,
        reverse,
        REDUCTION_CODES[reduction],
        _NOTHING if belief is None else matrix(belief),
        _NOTHING if dlogits is None else matrix(dlogits),
        loss.data_ptr(),
        fidelity.data_ptr(),
        consistency.data_ptr(),
    )
    return Result(loss, fidelity, consistency, belief, dlogits), arguments


def matrix(x: Tensor) -> tuple[int, int, int]:
    return (x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype])
