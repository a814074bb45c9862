"""The CUDA backend: loss, belief and gradient in one launch on PyTorch's current stream of the logits' device."""

from __future__ import annotations

from ..core import cuda
from .pack import pack
from .problem import Problem, Result


def run(problem: Problem) -> Result:
    """Return loss, belief and gradient without waiting for the GPU."""
    device = problem.logits.device
    with cuda.on_device(device):
        result, arguments = pack(problem)
        stream = cuda.current_stream(device)
        workspace = cuda.workspace(device, stream)
        cuda.compiled.local_loss(*arguments, workspace.data_ptr(), stream, device.index)
    return result
