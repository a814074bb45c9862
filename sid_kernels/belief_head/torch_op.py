"""The operator `torch.ops.sid_kernels.belief_head`: the belief head through PyTorch's dispatcher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import first_derivative, records_grad, scale_gradients
from ..core.checks import check_tensor
from ..core.options import HALF, LossOptions, compute_dtype, make_options
from ..core.torch_library import (
    OPTIONS_SCHEMA,
    count_flops,
    define_operator,
    options_arguments,
    refuse_functorch,
    split_alpha,
)
from ..local_loss.problem import LocalLoss
from . import dispatch
from .problem import LinearLayer, NeedGrad, PriorHead, belief_dtype, make_problem


def call(
    layer: LinearLayer,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor,
    options: tuple,
    return_belief: bool,
    backend: str,
    need: Sequence[bool] | None = None,
    row_scale: Tensor | None = None,
) -> tuple[LocalLoss, list[Tensor]]:
    """Return the result and the three gradients, empty if not wanted; those of half precision are in float32.

    options: the arguments of `LossOptions`, which the operator checks. need: as `NeedGrad`; None: what autograd needs.
    """
    refuse_functorch("fused_belief_head")
    for name, x in (("hidden", layer.hidden), ("weight", layer.weight), ("target", target)):
        check_tensor(name, x)
    if need is None:
        need = [x is not None and records_grad(x) for x in layer]
    priors = (None, *PriorHead(*prior)) if isinstance(prior, tuple) else (prior, None, None, None)
    loss, belief, fidelity, consistency, *gradients = belief_head(
        *layer,
        *(None if x is None else x.detach() for x in priors),
        target.detach(),
        *split_alpha(alpha, layer.hidden),
        *options_arguments(options),
        return_belief,
        *need,
        backend,
        row_scale,
    )
    return LocalLoss(loss, belief if return_belief else None, fidelity, consistency), gradients


class _Call:
    """The arguments of the operator, read in the order of its schema."""

    def __init__(self, *arguments: Any):
        self.layer = LinearLayer(*arguments[:3])
        prior, hidden, weight, bias = arguments[3:7]
        self.prior = prior if hidden is None else PriorHead(hidden, weight, bias)
        self.target, alpha, alpha_value = arguments[7:10]
        self.alpha: float | Tensor = alpha_value if alpha is None else alpha
        self.options: LossOptions = make_options(*arguments[10:14])
        self.return_belief: bool = arguments[14]
        need, (self.backend, self.row_scale) = NeedGrad(*arguments[15:18]), arguments[18:]
        # Without a reduction, backward calls again, with each row's incoming gradient.
        deferred = self.options.reduction == "none" and self.row_scale is None
        self.need = NeedGrad(False, False, False) if deferred else need


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    a = _Call(*arguments)
    result, gradients = dispatch.solve(
        a.layer, a.prior, a.target, a.alpha, a.options, a.return_belief, a.need, a.backend, a.row_scale
    )
    loss, belief, fidelity, consistency = result
    values = (loss.clone(), belief, fidelity.clone(), consistency.clone())  # outputs may not be views of one another
    return tuple(a.layer.hidden.new_empty(0) if x is None else x for x in (*values, *gradients))


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    a = _Call(*arguments)
    make_problem(a.layer, a.prior, a.target, a.alpha, a.options, a.return_belief, a.need)
    hidden, weight, _ = a.layer
    rows = hidden.shape[:-1]
    compute = compute_dtype(hidden)
    loss, fidelity, consistency = (
        hidden.new_empty(rows if a.options.reduction == "none" else (), dtype=compute) for _ in range(3)
    )
    belief = hidden.new_empty(0)
    if a.return_belief:
        dtype = belief_dtype(hidden.dtype, a.prior, a.options.reverse)
        belief = hidden.new_empty((*rows, weight.shape[0]), dtype=dtype)
    kind = torch.float32 if hidden.dtype in HALF else hidden.dtype
    gradients = [
        x.new_empty(x.shape, dtype=kind) if wanted and x is not None else hidden.new_empty(0)
        for x, wanted in zip(a.layer, a.need, strict=True)
    ]
    return loss, belief, fidelity, consistency, *gradients


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.inputs, ctx.need = len(inputs), inputs[15:18]
    ctx.unreduced, ctx.dtype = inputs[13] == "none", inputs[0].dtype
    if ctx.unreduced:
        ctx.save_for_backward(*inputs[:9])
        ctx.alpha_and_options, ctx.backend = inputs[9:14], inputs[18]
    else:
        ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    gradients: Sequence[Tensor | None]
    if ctx.unreduced:
        rest = (*ctx.alpha_and_options, False, *ctx.need, ctx.backend, grad_loss.detach())
        gradients = belief_head(*ctx.saved_tensors, *rest)[4:]
        if torch.is_grad_enabled():
            one = torch.ones((), device=grad_loss.device)
            gradients = [x if x is None else first_derivative(ctx, x, one, "fused_belief_head") for x in gradients]
        gradients = [x if x is None else x.to(ctx.dtype) for x in gradients]
    else:
        gradients = scale_gradients(ctx, ctx.saved_tensors, grad_loss, "fused_belief_head", ctx.dtype)
    needed = [x if need else None for x, need in zip(gradients, ctx.need, strict=True)]
    return *needed, *[None] * (ctx.inputs - 3)


belief_head = define_operator(
    "belief_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor? prior, Tensor? prior_hidden, "
    "Tensor? prior_weight, Tensor? prior_bias, Tensor target, Tensor? alpha, float alpha_value, "
    f"{OPTIONS_SCHEMA}, bool return_belief, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend, Tensor? row_scale) -> (Tensor loss, Tensor belief, Tensor fidelity, Tensor consistency, "
    "Tensor dhidden, Tensor dweight, Tensor dbias)",
    _run,
    _fake,
    _setup_context,
    _backward,
)


def _flops(hidden: tuple, weight: tuple, bias: Any, prior: Any, prior_hidden: tuple | None, *rest: Any) -> int:
    """Count a product for the logits, one for those of a prior head, and one for each gradient of a matrix."""
    reduction, (need_hidden, need_weight), row_scale = rest[8], rest[10:12], rest[-1]
    deferred = reduction == "none" and row_scale is None
    gradients = 0 if deferred else bool(need_hidden) + bool(need_weight)
    rows = math.prod(hidden[:-1])
    of_prior = 0 if prior_hidden is None else prior_hidden[-1]
    return 2 * rows * weight[0] * ((1 + gradients) * hidden[-1] + of_prior)


count_flops(belief_head, _flops)
