"""Load the compiled modules, and convert tensors and loss options to their arguments.

Compiled code knows no PyTorch. It receives addresses, strides and numbers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .options import LossOptions

PACKAGE = "sid_kernels"  # not __package__, which is sid_kernels.core here
FOLDER = Path(__file__).resolve().parents[1]
INTERFACE = 2  # kInterface in csrc/bindings/arguments.h: raise both if the arguments of a binding change
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/local_loss.h
NO_MATRIX = (0, 0, 0)
Matrix = tuple[int, int, int]


def load(name: str) -> tuple[Any, str | None]:
    """Return the compiled module sid_kernels.NAME and None, or None and the reason it cannot be loaded."""
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError:
        return None, f"the compiled module {PACKAGE}.{name} is not in {FOLDER}: {_why_missing(name)}"
    except ImportError as error:
        return None, f"the compiled module {PACKAGE}.{name} does not load: {error}"
    interface = getattr(module, "interface", 1)
    if interface != INTERFACE:
        return None, (
            f"the compiled module {module.__file__} has interface {interface} and the Python files beside it"
            f" {INTERFACE}: build again (pip install -e .)"
        )
    return module, None


def _why_missing(name: str) -> str:
    """Return why a compiled module is not beside the Python files: another copy of the package has it, or none."""
    for entry in sys.path:
        other = (Path(entry) / PACKAGE).resolve()
        if other != FOLDER and any(other.glob(f"{name}.*")):
            return f"this checkout was not built, and hides the package installed in {other}; run in another folder"
    return "it was not built (no working compiler at installation, or a checkout: pip install -e .)"


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
