"""The gradient of the local loss in half precision: the incoming gradient multiplies it before it is rounded.

The gradient of a mean is small, and in float16 much of it would vanish before a loss scale arrives. A tensor of few
elements is therefore kept in float32 until `backward`. Otherwise the inputs are saved, and `backward` computes the
gradient again unless the incoming gradient is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import batched, keeps_graph, once_differentiable, scaled
from ..core.options import HALF, LossSpec
from .dispatch import run
from .problem import LocalLossProblem

MOST_KEPT = 1 << 18  # elements; above, computing a gradient again is faster than new memory for it in float32


def keeps_float32(problem: LocalLossProblem) -> bool:
    """Return whether the forward pass computes the gradient in float32 and keeps it: small float16 ones on a CPU."""
    logits = problem.logits
    return logits.dtype is torch.float16 and logits.is_cpu and logits.numel() <= MOST_KEPT


def computes_ahead(problem: LocalLossProblem, backend: str) -> bool:
    """Return whether the forward pass computes the gradient for an incoming gradient of 1, as `loss.backward()` has it.

    float16 usually goes with a loss scale. On a GPU only the CUDA kernel can find out the incoming gradient without
    waiting for it.
    """
    if problem.logits.dtype not in HALF:
        return True
    if problem.logits.dtype is torch.float16:
        return False
    return problem.logits.is_cpu or backends.choose(backend, problem.logits) == "cuda"


def compute_dlogits(
    problem: LocalLossProblem, backend: str, grad_loss: Tensor, ahead: Tensor | None, keep: bool
) -> Tensor:
    """Return dlogits of a half-precision problem for the incoming gradient grad_loss, () or (...).

    It is (N, C), or (..., C) for a batch of incoming gradients of rows. ahead: the gradient for an incoming gradient of
    1, if it is known. keep: if True, its memory is not given away.
    """
    if batched(grad_loss):
        wide = torch.empty(problem.logits.shape, dtype=torch.float32, device=problem.logits.device)
        run(problem._replace(out=wide, need_grad=True, need_belief=False), backend)
        wide = wide.view(*grad_loss.shape, -1) if grad_loss.dim() else wide
        return scaled(wide, grad_loss).to(problem.logits.dtype)
    incoming = grad_loss.detach()
    if incoming.dim():  # one number expanded to all rows, as that of `loss.sum()`, or one for each row
        expanded = incoming.numel() and not any(incoming.stride())
        incoming = incoming.as_strided((), ()) if expanded else incoming.reshape(-1).contiguous()
    out = None if keep or ahead is None else ahead
    problem = problem._replace(
        need_grad=True, need_belief=False, out=out, incoming=incoming.float(), precomputed=out is not None
    )
    dlogits = run(problem, backend).dlogits
    assert dlogits is not None
    return dlogits


def is_one(incoming: Tensor) -> bool:
    """Return whether an incoming gradient on the CPU is the number 1, also expanded to all rows."""
    if incoming.dim():
        if any(incoming.stride()) or not incoming.numel():
            return False
        incoming = incoming.as_strided((), ())
    return incoming.item() == 1.0


class AttachHalf(torch.autograd.Function):
    """Attach the gradient of half-precision logits to their computed loss."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: tuple[Tensor, Tensor | None], problem: LocalLossProblem, backend: str
    ) -> Tensor:
        loss, ahead = values
        spec = problem.spec
        ctx.options, ctx.backend, ctx.shape = spec.options, backend, logits.shape
        ctx.alpha = None if isinstance(spec.alpha, Tensor) else spec.alpha
        alpha = spec.alpha if isinstance(spec.alpha, Tensor) else None
        ctx.save_for_backward(ahead, problem.logits, problem.prior, spec.labels, spec.soft, alpha)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return None, None, None, None
        ahead, logits, prior, labels, soft, alpha = ctx.saved_tensors
        if ahead is not None and grad_loss.is_cpu and not batched(grad_loss) and is_one(grad_loss):
            dlogits = ahead.clone() if keeps_graph() else ahead
        else:
            spec = LossSpec(labels, soft, ctx.alpha if alpha is None else alpha, ctx.options)
            problem = LocalLossProblem(logits, prior, spec, need_grad=True)
            ahead = None if ahead is None else ahead.view(logits.shape)
            with torch.no_grad():
                dlogits = compute_dlogits(problem, ctx.backend, grad_loss, ahead, keeps_graph())
        if dlogits.shape != ctx.shape:
            dlogits = dlogits.view(ctx.shape)
        if torch.is_grad_enabled():  # create_graph=True
            dlogits = once_differentiable(ctx, dlogits, "fused_local_loss")
        return dlogits, None, None, None
