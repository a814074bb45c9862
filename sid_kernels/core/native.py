"""The compiled modules: how they are loaded, and how tensors and loss options become their arguments.

Compiled code knows no PyTorch. It receives addresses, strides and numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .options import LossOptions

PACKAGE = "sid_kernels"  # not __package__, which is sid_kernels.core here
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/local_loss.h
NO_MATRIX = (0, 0, 0)
Matrix = tuple[int, int, int]


def load(name: str) -> tuple[Any, str | None]:
    """Return the compiled module sid_kernels.NAME and None, or None and the reason it cannot be loaded."""
    try:
        return importlib.import_module(f"{PACKAGE}.{name}"), None
    except ModuleNotFoundError:
        return None, f"the compiled module {PACKAGE}.{name} was not built (no working compiler at installation?)"
    except ImportError as error:
        return None, f"the compiled module {PACKAGE}.{name} does not load: {error}"


def matrix(x: Tensor | None) -> Matrix:
    """Return (address, row stride, dtype code) of x (N, C) with adjacent columns; zeros for None."""
    return NO_MATRIX if x is None else (x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype])


def pack_spec(
    labels: Tensor | None, soft: Tensor | None, alpha: float | Tensor, options: LossOptions
) -> tuple[int, Matrix, int, int, float, tuple[bool, float, int, int]]:
    """Return the fields of LossSpec in csrc/local_loss.h; takes the fields of `LossSpec`."""
    address = 0 if labels is None else labels.data_ptr()
    probabilities = NO_MATRIX if soft is None else matrix(soft)
    if isinstance(alpha, float):
        return address, probabilities, 0, 0, alpha, options.packed
    return address, probabilities, alpha.data_ptr(), alpha.dim(), 0.0, options.packed
