"""Triton: whether it can be used, the device of a launch, and scaling in place.

Importing this file needs neither the triton package nor a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from types import ModuleType

import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once, at import

SCALE_ELEMENTS, SCALE_WARPS = 2048, 8  # per program of scale_


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels at first use: importing triton takes longer than importing the rest of this package."""
    from . import triton_kernels

    return triton_kernels


def unavailable() -> str | None:
    """Return why Triton kernels cannot be used, or None if they can."""
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error}); install the triton package"
    if not INTERPRETING and not torch.cuda.is_available():
        return "no GPU is visible to PyTorch (TRITON_INTERPRET=1, set before the import, runs the kernels on the CPU)"
    return None


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which launches go to `device` and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def scale_tiles() -> list[tuple[int, int]]:
    """Return the (rows, columns) of a program of `scale_`, by the power of two that C fits in."""
    blocks = [1 << i for i in range(4, SCALE_ELEMENTS.bit_length())]
    return [(SCALE_ELEMENTS // block, block) for block in blocks]


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """Multiply gradient (N, C), adjacent columns, in place by scale, float32, () or (N,).

    A tile whose scales are all 1 is neither read nor written.
    """
    rows, classes = gradient.shape
    if rows and classes:
        tile, block = next((t for t in scale_tiles() if classes <= t[1]), scale_tiles()[-1])
        with on_device(gradient.device):
            _kernels().scale_rows[(-(-rows // tile), -(-classes // block))](
                gradient,
                scale,
                gradient.stride(0),
                scale.stride(0) if scale.dim() else 0,  # 0 also if one number is expanded to all rows
                rows,
                classes,
                ROWS=tile,
                BLOCK_C=block,
                num_warps=SCALE_WARPS,
            )
    return gradient
