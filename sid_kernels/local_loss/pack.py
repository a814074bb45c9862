"""Convert a `LocalLossProblem` to the arguments of the compiled kernels: addresses, strides and numbers."""

from __future__ import annotations

from ..core.native import matrix, pack_spec
from .problem import LocalLossOutputs, LocalLossProblem, allocate


def pack(problem: LocalLossProblem) -> tuple[LocalLossOutputs, tuple]:
    """Return the outputs to fill, and the arguments of `local_loss_problem` in csrc/bindings/arguments.h."""
    outputs = allocate(problem)
    loss, belief, fidelity, consistency, dlogits = outputs
    written: tuple = (loss.data_ptr(), matrix(belief), fidelity.data_ptr(), consistency.data_ptr(), matrix(dlogits))
    if (incoming := problem.incoming) is not None:
        written = (*written, (incoming.data_ptr(), incoming.dim(), problem.precomputed))
    logits = problem.logits
    return outputs, (*logits.shape, matrix(logits), matrix(problem.prior), pack_spec(*problem.spec), written)
