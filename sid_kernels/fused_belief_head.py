"""The public operations `fused_belief_head` (differentiable) and `belief_head_and_grad` (returns the gradients).

This file chooses between the direct call and the operator of `belief_head/torch_op.py`, and holds the autograd
Function of unreduced losses. It computes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from .belief_head import dispatch, torch_op
from .belief_head.problem import Gradients, LinearLayer, NeedGrad, PriorHead
from .belief_head.unfused import batch_of_gradients, sharded_head, unfused_head
from .core.autograd import (
    attach,
    autocast_dtype,
    batched,
    first_derivative,
    needs_operator,
    overrides,
    transforming,
    wants_grad,
)
from .core.options import OPTION_NAMES, make_options
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
    """Compute linear layer, softmax and local loss of one SID stage (arXiv 2510.03273), a chunk of logits at a time.

    The results are those of `fused_local_loss(hidden @ weight.T + bias, prior, ...)`. The gradients of hidden, weight
    and bias are computed with the loss, chunk by chunk, and `backward` returns them. With reduction "none", `backward`
    computes them, from recomputed logits. With `return_belief=False`, and a prior that is None or another head, no
    tensor (N, C) exists at any time. A chunk takes 56 MiB on a CPU, 256 MiB on a GPU, or one row if that is more.

    Args:
        hidden: h, (..., H), float32, bfloat16 or float16 (float64 on the reference backend). Differentiable.
        weight: (C, H), in the hidden's dtype, as `nn.Linear` keeps it. Differentiable.
        bias: (C,), or None. Differentiable.
        prior: q, (..., C) class probabilities; None for the uniform prior; or the head it comes from, a tuple
            (hidden (..., H'), weight (C, H'), bias (C,) or None), whose softmax is computed chunk by chunk. A constant.
        target: y, integer labels (...) or class probabilities (..., C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, or a tensor () or (...).
        return_belief: if False, LocalLoss.belief is None.

    torch.func transforms, forward-mode differentiation and DTensors (rows or vocabulary sharded) hold all logits at
    once. In half precision the gradients are kept in float32 until `backward` rounds them, once.

    The other arguments are those of `fused_local_loss`. Under autocast the head (and a prior head) uses autocast's
    dtype, as `nn.Linear` does.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's loss and gradient are NaN.
        RuntimeError: the backend cannot be used here, or a second derivative is asked for.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    if not isinstance(hidden, Tensor) and (handlers := overrides(hidden)):
        kwargs = dict(zip(OPTION_NAMES, options, strict=True), return_belief=return_belief, backend=backend)
        return handle_torch_function(fused_belief_head, handlers, hidden, weight, bias, prior, target, alpha, **kwargs)
    layer, prior = _autocast(LinearLayer(hidden, weight, bias), prior)
    parts = prior if isinstance(prior, tuple) else (prior,)
    if needs_operator(*layer, *parts, target, alpha):
        if transforming() or sharded_head(layer, prior, target):
            return unfused_head(layer, prior, target, alpha, options, return_belief, backend)
        return torch_op.call(layer, prior, target, alpha, options, return_belief, backend)[0]
    checked = make_options(*options)
    need = NeedGrad(*(wants_grad(x) for x in layer))
    need_now = need if checked.reduction != "none" else NeedGrad(False, False, False)
    result, gradients = dispatch.solve(layer, prior, target, alpha, checked, return_belief, need_now, backend)
    if not any(need):
        return result
    if checked.reduction == "none":
        constants = (prior, target, alpha, checked, backend)
        return result._replace(loss=_Unreduced.apply(result.loss.detach(), need, constants, *layer))
    return result._replace(loss=attach("fused_belief_head", result.loss, gradients, layer))


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
    """Compute `fused_belief_head` without autograd: return (LocalLoss, Gradients(hidden, weight, bias)).

    The gradients are those of the reduced loss ("none": of the sum), in the hidden's dtype; float16 represents those of
    a mean over many rows poorly. Gradients.bias is None without a bias. Autocast has no effect. The arguments and the
    errors are those of `fused_belief_head`.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    layer, need = LinearLayer(hidden, weight, bias), NeedGrad(True, True, bias is not None)
    parts = prior if isinstance(prior, tuple) else (prior,)
    if not needs_operator(*layer, *parts, target, alpha):
        result, gradients = dispatch.solve(
            layer, prior, target, alpha, make_options(*options), return_belief, need, backend
        )
        return result, Gradients(*(None if x is None else x.to(hidden.dtype) for x in gradients))
    ones = hidden.new_ones(hidden.shape[:-1], dtype=torch.float32) if reduction == "none" else None
    result, outputs = torch_op.call(layer, prior, target, alpha, options, return_belief, backend, need, ones)
    loss, belief, fidelity, consistency = (None if x is None else x.detach() for x in result)
    assert loss is not None and fidelity is not None and consistency is not None
    kept = (x.detach().to(hidden.dtype) if needed else None for x, needed in zip(outputs, need, strict=True))
    return LocalLoss(loss, belief, fidelity, consistency), Gradients(*kept)


class BeliefHead(nn.Linear):
    """Linear layer from hidden (..., H) to the logits of C classes, and the local loss of their belief.

    Parameters, their initial values and the state dict are those of `nn.Linear(hidden_dim, num_classes)`. A call
    with a target returns the local loss without holding all logits; a call without one is the plain layer.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_classes: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_dim, num_classes, bias, device=device, dtype=dtype)

    def forward(  # type: ignore[override]  # with a target it returns more than nn.Linear
        self,
        hidden: Tensor,
        prior: Tensor | PriorHead | None = None,
        target: Tensor | None = None,
        alpha: float | Tensor = 0.5,
        **options: Any,
    ) -> LocalLoss | Tensor:
        """Compute the local loss of hidden (..., H) against target, (...) or (..., C), or return logits.

        With `hidden` alone it is `nn.Linear` and returns the logits (..., C), as a model expects of its output layer.
        prior: (..., C), None, or `another_head.as_prior(its_hidden)`. options: the keyword arguments of
        `fused_belief_head`, which documents all arguments and errors.
        """
        if target is None:
            if prior is not None or options:
                raise TypeError("target is None; with a prior or an option it must be labels or class probabilities")
            return self.logits(hidden)
        return fused_belief_head(hidden, self.weight, self.bias, prior, target, alpha, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., C) of hidden (..., H)."""
        return F.linear(hidden, self.weight, self.bias)

    def as_prior(self, hidden: Tensor) -> PriorHead:
        """Return the belief of this head over hidden (..., H) as a prior that is never stored and gets no gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return PriorHead(hidden.detach(), self.weight.detach(), bias)


class _Unreduced(torch.autograd.Function):
    """Losses of single rows. Their gradients depend on the incoming gradient of each row, so backward computes them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, need: NeedGrad, constants: tuple, *inputs: Tensor | None) -> Tensor:
        prior, target, alpha, *ctx.options_and_backend = constants
        parts = prior if isinstance(prior, tuple) else (prior, None, None)
        ctx.prior_is_head, ctx.need = isinstance(prior, tuple), need
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(*inputs, target, alpha if isinstance(alpha, Tensor) else None, *parts)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return (None,) * 6
        hidden, weight, bias, target, alpha, *parts = ctx.saved_tensors
        layer, prior = LinearLayer(hidden, weight, bias), PriorHead(*parts) if ctx.prior_is_head else parts[0]
        options, backend = ctx.options_and_backend
        alpha = ctx.alpha if alpha is None else alpha
        gradients: Sequence[Tensor | None]
        if batched(grad_loss):
            arguments = (prior, target, alpha, dataclasses.astuple(options), False, backend)
            gradients = batch_of_gradients(layer, arguments, ctx.need, grad_loss)
        else:
            _, gradients = dispatch.solve(
                layer, prior, target, alpha, options, False, ctx.need, backend, grad_loss.detach()
            )
        if torch.is_grad_enabled():  # create_graph=True: a constant whose own derivative raises
            one = torch.ones((), device=hidden.device)
            gradients = [None if x is None else first_derivative(ctx, x, one, "fused_belief_head") for x in gradients]
        return None, None, None, *(None if x is None else x.to(hidden.dtype) for x in gradients)


def _autocast(layer: LinearLayer, prior: Tensor | PriorHead | None) -> tuple[LinearLayer, Tensor | PriorHead | None]:
    """Cast the layer, and a prior that is a head, to the dtype of autocast, if that is enabled."""
    if not isinstance(layer.hidden, Tensor) or (dtype := autocast_dtype(layer.hidden)) is None:
        return layer, prior

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return LinearLayer(*map(cast, layer)), PriorHead(*map(cast, prior)) if isinstance(prior, tuple) else prior
