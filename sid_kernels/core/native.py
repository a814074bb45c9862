"""The compiled modules: how they are loaded, and how tensors and loss options become their arguments.

Compiled code knows no PyTorch. It receives addresses, strides and numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

PACKAGE = "sid_kernels"  # not __package__, which is sid_kernels.core here
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/local_loss.h
NO_MATRIX = (0, 0, 0)


def load(name: str) -> tuple[Any, str | None]:
    """Return the compiled module sid_kernels.NAME and None, or None and the reason it cannot be loaded."""
    try:
        return importlib.import_module(f"{PACKAGE}.{name}"), None
    except ModuleNotFoundError:
        return None, f"the compiled module {PACKAGE}.{name} was not built (no working compiler at installation?)"
    except ImportError as error:
        return None, f"the compiled module {PACKAGE}.{name} does not load: {error}"


def matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Return (address, row stride, dtype code) of x (N, C) with adjacent columns; zeros for None."""
    return NO_MATRIX if x is None else (x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype])
