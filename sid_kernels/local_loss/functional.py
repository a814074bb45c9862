"""The local loss under torch.func transforms and forward-mode differentiation, which call `forward` with plain tensors.

The first derivative is right under every combination of them; a second one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ..core.autograd import forward_mode, once_differentiable, scaled, transforms
from ..core.options import HALF, make_options
from .dispatch import run_shaped
from .problem import make_problem

NAME = "fused_local_loss"


def call_transformed(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, options: tuple, backend: str
) -> tuple[Tensor, ...]:
    """Return (loss, belief, fidelity, consistency, dlogits); dlogits is in float32 for half precision.

    Raises:
        RuntimeError: forward-mode and reverse-mode differentiation are combined, which asks for a second derivative.
    """
    kinds = [x.key() for x in transforms()]
    if TransformType.Grad in kinds and (TransformType.Jvp in kinds or forward_mode()):
        raise RuntimeError(
            f"{NAME} has no second derivative: it was asked for by forward-mode together with reverse-mode"
        )
    return _Transformed.apply(logits, prior, target, alpha, options, backend)


class _Transformed(torch.autograd.Function):
    """The local loss and its gradient; a derivative of the gradient raises."""

    @staticmethod
    def forward(
        logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, options: tuple, backend: str
    ) -> tuple[Tensor, ...]:
        problem = make_problem(logits, prior, target, alpha, make_options(*options))
        if logits.dtype in HALF:  # rounded in backward, once
            wide = torch.empty(problem.logits.shape, dtype=torch.float32, device=logits.device)
            problem = problem._replace(out=wide)
        loss, belief, fidelity, consistency, dlogits = run_shaped(problem, backend, logits.shape)
        assert belief is not None and dlogits is not None
        return loss, belief, fidelity, consistency, dlogits.view(logits.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.dtype, ctx.unreduced = inputs[0].dtype, inputs[4][3] == "none"
        ctx.save_for_backward(output[4])
        ctx.save_for_forward(output[4])
        ctx.mark_non_differentiable(*output[1:4])  # not dlogits: differentiating it must reach the error
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *rest: Tensor | None) -> tuple:
        if rest[3] is not None:
            raise RuntimeError(f"{NAME} has no second derivative: it was asked for by differentiating its gradient")
        if grad_loss is None:
            return (None,) * 6
        (dlogits,) = ctx.saved_tensors
        gradient = scaled(dlogits, grad_loss).to(ctx.dtype)
        if torch.is_grad_enabled() and not transforms():
            gradient = once_differentiable(ctx, gradient, NAME)
        return gradient, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: object) -> tuple:
        (dlogits,) = ctx.saved_tensors
        if tangent is None:
            return (None,) * 5
        change = (dlogits * tangent.to(dlogits.dtype)).sum(-1)
        # The gradient is differentiable for its error alone: `call_transformed` refuses what would read its tangent.
        return change if ctx.unreduced else change.sum(), None, None, None, torch.zeros_like(dlogits)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor,
        options: tuple, backend: str,
    ) -> tuple:  # fmt: skip
        """Compute all samples as rows of one call, then reduce within each sample."""

        def batched(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        z, q, y = (batched(x, dim) for x, dim in zip((logits, prior, target), in_dims[:3], strict=True))
        rows, samples = z.shape[:-1], z.shape[:1]
        if isinstance(alpha, Tensor) and (in_dims[3] is not None or alpha.dim()):
            weight: Tensor = batched(alpha, in_dims[3])
            alpha = weight.view(*weight.shape, *[1] * (len(rows) - weight.dim())).expand(rows)
        divergence, smoothing, ignore_index, reduction = options
        per_row = (divergence, smoothing, ignore_index, "none")
        loss, belief, fidelity, consistency, dlogits = _Transformed.apply(z, q, y, alpha, per_row, backend)
        values = [loss, fidelity, consistency]
        if reduction != "none":
            values = [x.flatten(1).sum(1) if x.dim() > 1 else x for x in values]
        if reduction == "mean":
            counted = torch.full(samples, rows[1:].numel(), device=z.device)
            if not y.dtype.is_floating_point:
                counted = (y != ignore_index).reshape(*samples, -1).sum(1)
            scale = 1.0 / counted.clamp(min=1).to(values[0].dtype)
            values = [x * scale for x in values]
            dlogits = dlogits * scale.view(*samples, *[1] * (z.dim() - 1))
        loss, fidelity, consistency = values
        return (loss, belief, fidelity, consistency, dlogits), (0,) * 5
