"""The compiled CUDA kernels: whether they can be used, their workspaces, and scaling in place.

They need compute capability 8.0 or later. Nothing here except `unavailable` waits for the GPU.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .native import load, matrix

compiled, _reason = load("_cuda")

# (device, stream) -> memory that the kernels of one stream share; each launch leaves it ready for the next.
_workspaces: dict[tuple[int, int], Tensor] = {}
_SAME_DEVICE = contextlib.nullcontext()


def unavailable() -> str | None:
    """Return why the CUDA kernels cannot be used, found by running one, or None if they can."""
    if _reason is not None:
        return _reason
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm; these kernels are CUDA's"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    try:
        gradient = torch.ones(1, 4, device="cuda")
        scale_(gradient, torch.full((), 2.0, device="cuda"))
        if gradient.tolist() != [[2.0] * 4]:
            return "a first kernel gave a wrong result"
    except Exception as error:  # a driver older than the runtime, a GPU older than the kernels, ...
        return f"a first kernel did not run: {error}"
    return None


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """Multiply gradient (N, C), adjacent columns, in place by scale, float32, () or (N,).

    Rows whose scale is 1 are neither read nor written.
    """
    device = gradient.device
    with on_device(device):
        rows, classes = gradient.shape
        stream = current_stream(device)
        step = scale.stride(0) if scale.dim() else 0
        place = matrix(gradient)
        compiled.scale(rows, classes, place, place, scale.data_ptr(), step, stream, device.index)
    return gradient


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which `device` is current.

    Entering one costs more host time than a small kernel, so it is entered only if another device is current.
    """
    return _SAME_DEVICE if torch._C._cuda_getDevice() == device.index else torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Return the handle of PyTorch's current stream of `device`, without making a Stream object."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def workspace(device: torch.device, stream: int) -> Tensor:
    """Return the device memory that launches on `stream` of the current device share."""
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream, beside others: it gets its own memory, zeroed at each replay.
        return torch.zeros(compiled.workspace_bytes(), dtype=torch.uint8, device=device)
    memory = _workspaces.get((device.index, stream))
    if memory is None:
        memory = torch.zeros(compiled.workspace_bytes(), dtype=torch.uint8, device=device)
        _workspaces[device.index, stream] = memory
    return memory
