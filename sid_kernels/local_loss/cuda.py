"""The CUDA backend: C++ kernels for compute capability 8.0 and later, loss, belief and gradient in one launch.

Nothing here waits for the GPU. Kernels run on PyTorch's current stream of the logits' device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pack import DTYPE_CODES, load, pack
from .problem import Problem, Result

_cuda, _missing = load("_cuda")

# (device, stream) -> memory the kernels of one stream share; each launch leaves it as it found it.
_workspaces: dict[tuple[int, int], Tensor] = {}


def unavailable() -> str | None:
    """Why these kernels cannot run here, found by running one; None if they can."""
    if _missing is not None:
        return _missing
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


def run(problem: Problem) -> Result:
    device = problem.logits.device
    with torch.cuda.device(device):
        result, arguments = pack(problem)
        stream = torch.cuda.current_stream().cuda_stream
        workspace = _workspace(device, stream)
        _cuda.local_loss(*arguments, workspace.data_ptr(), stream, device.index)
    return result


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient (N, C), unit column stride, times scale (float32, 0-d or (N,)), in place; a scale of 1 costs nothing."""
    device = gradient.device
    with torch.cuda.device(device):
        matrix = (gradient.data_ptr(), gradient.stride(0), DTYPE_CODES[gradient.dtype])
        stream = torch.cuda.current_stream().cuda_stream
        rows, classes = gradient.shape
        step = scale.stride(0) if scale.dim() else 0
        _cuda.scale(rows, classes, matrix, matrix, scale.data_ptr(), step, stream, device.index)
    return gradient


def _workspace(device: torch.device, stream: int) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream, beside others: it gets memory of its own, zeroed at each replay.
        return torch.zeros(_cuda.workspace_bytes(), dtype=torch.uint8, device=device)
    workspace = _workspaces.get((device.index, stream))
    if workspace is None:
        workspace = torch.zeros(_cuda.workspace_bytes(), dtype=torch.uint8, device=device)
        _workspaces[device.index, stream] = workspace
    return workspace
