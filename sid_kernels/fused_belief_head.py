"""The public operations `fused_belief_head` (differentiable) and `belief_head_and_grad` (gradients in hand).

This file chooses between the direct call and the operator of `belief_head/torch_op.py`, and holds the autograd
Function of unreduced losses. It computes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .belief_head import dispatch, torch_op
from .belief_head.dispatch import Gradients
from .belief_head.problem import PriorHead
from .core.autograd import attach, autocast_dtype, first_derivative, needs_operator
from .local_loss.problem import LocalLoss


def fused_belief_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_belief: bool = True,
    backend: str = "auto",
) -> LocalLoss:
    """Linear layer, softmax and local loss of one SID stage (arXiv 2510.03273), at most a chunk of logits at a time.

    The numbers are those of `fused_local_loss(hidden @ weight.T + bias, prior, ...)`. The gradients of hidden, weight
    and bias are computed with the loss, chunk by chunk, and handed out by `backward` ("none": computed there, from
    logits that are computed again). With `return_belief=False`, and a prior that is None or another head, nothing of
    the size (N, C) exists at any time: a chunk takes 56 MiB on a CPU, 256 MiB on a GPU, or one row if that is more.

    Args:
        hidden: h, (..., H), float32, bfloat16 or float16 (float64 on the reference backend). Differentiable.
        weight: (C, H), in the hidden's dtype, as `nn.Linear` keeps it. Differentiable.
        bias: (C,), or None. Differentiable.
        prior: q, (..., C) class probabilities; None for the uniform prior; or the head it comes from, a tuple
            (hidden (..., H'), weight (C, H'), bias (C,) or None), whose softmax is computed chunk by chunk. A constant.
        target: y, integer labels (...) or class probabilities (..., C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, or a tensor () or (...).
        divergence, label_smoothing, ignore_index, reduction, backend: as in `fused_local_loss`.
        return_belief: False leaves LocalLoss.belief None.

    Under autocast the parts of the head (and of a prior head) are taken in autocast's dtype, as `nn.Linear` does.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's loss and gradient are NaN.
        RuntimeError: the backend asked for cannot be used here; or a second derivative is asked for.
    """
    hidden, weight, bias, prior = _autocast(hidden, weight, bias, prior)
    options = (divergence, label_smoothing, ignore_index, reduction)
    parts = prior if isinstance(prior, tuple) else (prior,)
    if needs_operator(hidden, weight, bias, *parts, target, alpha):
        return torch_op.call(hidden, weight, bias, prior, target, alpha, options, return_belief, backend)[0]
    inputs = (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    need = tuple(wanted and isinstance(x, Tensor) and x.requires_grad for x in inputs)
    with_it = need if reduction != "none" else (False,) * 3
    result, gradients = dispatch.solve(
        hidden, weight, bias, prior, target, alpha, options, return_belief, with_it, backend
    )
    if not wanted:
        return result
    if reduction == "none":
        constants = (prior, target, alpha, options, backend)
        return result._replace(loss=_Unreduced.apply(result.loss.detach(), need, constants, *inputs))
    return result._replace(loss=attach("fused_belief_head", result.loss, gradients, inputs))


def belief_head_and_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_belief: bool = True,
    backend: str = "auto",
) -> tuple[LocalLoss, Gradients]:
    """`fused_belief_head` without autograd: (LocalLoss, Gradients(hidden, weight, bias)).

    The gradients are those of the reduced loss ("none": of the sum), in the hidden's dtype (float16 holds those of a
    mean over many rows poorly); bias: None where there is none. Autocast is not looked at. Raises as
    `fused_belief_head` does.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    need = (True, True, bias is not None)
    parts = prior if isinstance(prior, tuple) else (prior,)
    if needs_operator(hidden, weight, bias, *parts, target, alpha):
        ones = hidden.new_ones(hidden.shape[:-1], dtype=torch.float32) if reduction == "none" else None
        result, gradients = torch_op.call(
            hidden, weight, bias, prior, target, alpha, options, return_belief, backend, need, ones
        )
        result = LocalLoss(*(None if x is None else x.detach() for x in result))
        return result, Gradients(*(x.detach() if n else None for x, n in zip(gradients, need, strict=True)))
    return dispatch.solve(hidden, weight, bias, prior, target, alpha, options, return_belief, need, backend)


class BeliefHead(nn.Linear):
    """Linear layer from hidden (..., H) to the logits of C classes, and the local loss of the belief they give.

    Parameters, their initial values and state dict are `nn.Linear(hidden_dim, num_classes)`'s. Called, it returns the
    local loss without ever holding all logits; `logits` is the plain layer, for inference.
    """

    def __init__(self, hidden_dim: int, num_classes: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__(hidden_dim, num_classes, bias, device=device, dtype=dtype)

    def forward(
        self, hidden: Tensor, prior: Tensor | PriorHead | None, target: Tensor, alpha: float | Tensor = 0.5, **options
    ) -> LocalLoss:
        """hidden (..., H), prior (..., C), None or `another_head.as_prior(its_hidden)`, target (...) or (..., C).

        `options` and errors: those of `fused_belief_head`.
        """
        return fused_belief_head(hidden, self.weight, self.bias, prior, target, alpha, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., H) -> (..., C)."""
        return F.linear(hidden, self.weight, self.bias)

    def as_prior(self, hidden: Tensor) -> PriorHead:
        """The belief of this head over hidden (..., H), as a prior that is never stored. No gradient comes back."""
        bias = None if self.bias is None else self.bias.detach()
        return PriorHead(hidden.detach(), self.weight.detach(), bias)


class _Unreduced(torch.autograd.Function):
    """Losses of every row: their gradients depend on how much each row counts, which is known in backward only."""

    @staticmethod
    def forward(ctx, loss, need, constants, *inputs):
        prior, target, alpha, *ctx.rest = constants
        parts = prior if isinstance(prior, tuple) else (prior, None, None)
        ctx.prior_is_head, ctx.need = isinstance(prior, tuple), need
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(*inputs, target, alpha if isinstance(alpha, Tensor) else None, *parts)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 6
        hidden, weight, bias, target, alpha, *parts = ctx.saved_tensors
        prior = PriorHead(*parts) if ctx.prior_is_head else parts[0]
        options, backend = ctx.rest
        _, gradients = dispatch.solve(
            hidden, weight, bias, prior, target, ctx.alpha if alpha is None else alpha, options, False, ctx.need,
            backend, grad_loss.detach(),
        )  # fmt: skip
        if torch.is_grad_enabled():  # create_graph=True: a constant, whose own derivative is refused
            one = torch.ones((), device=hidden.device)
            gradients = [None if x is None else first_derivative(ctx, x, one, "fused_belief_head") for x in gradients]
        return None, None, None, *gradients


def _autocast(hidden, weight, bias, prior):
    if not isinstance(hidden, Tensor) or (dtype := autocast_dtype(hidden)) is None:
        return hidden, weight, bias, prior

    def cast(x):
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    prior = PriorHead(*map(cast, prior)) if isinstance(prior, tuple) else prior
    return cast(hidden), cast(weight), cast(bias), prior
