"""The CUDA backend: loss, belief and gradient in one launch on PyTorch's current stream of the logits' device."""

from __future__ import annotations

from ..core import cuda
from .pack import pack
from .problem import LocalLossOutputs, LocalLossProblem


def run(problem: LocalLossProblem) -> LocalLossOutputs:
    """Return loss, belief and gradient of a problem on a CUDA device, without waiting for it."""
    device = problem.logits.device
    with cuda.on_device(device):
        outputs, arguments = pack(problem)
        stream = cuda.current_stream(device)
        workspace = cuda.workspace(device, stream)
        cuda.compiled.local_loss(*arguments, workspace.data_ptr(), stream, device.index)
    return outputs
