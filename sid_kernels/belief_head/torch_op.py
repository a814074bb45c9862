"""The operator `torch.ops.sid_kernels.belief_head`: what torch.compile, export and fake tensors see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.autograd import all_times, first_derivative, functorch_stack, is_compiling
from ..core.checks import check_tensor
from ..core.torch_library import library
from ..local_loss.problem import LocalLoss
from . import dispatch
from .problem import PriorHead, belief_dtype, make_head

library.define(
    "belief_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor? prior, Tensor? prior_hidden, "
    "Tensor? prior_weight, Tensor? prior_bias, Tensor target, Tensor? alpha, float alpha_value, "
    "str divergence, float label_smoothing, int ignore_index, str reduction, bool return_belief, bool need_hidden, "
    "bool need_weight, bool need_bias, "
    "str backend, Tensor? row_scale) -> (Tensor loss, Tensor belief, Tensor fidelity, Tensor consistency, "
    "Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_INPUTS = 20


def call(
    hidden, weight, bias, prior, target, alpha, options, return_belief, backend, need=None, row_scale=None
) -> tuple[LocalLoss, list[Tensor]]:
    """The result and the three gradients, empty where not wanted. `need` None: as autograd wants them."""
    if not is_compiling() and functorch_stack() is not None:
        raise RuntimeError("fused_belief_head does not take part in torch.func transforms; use torch.autograd")
    for name, x in (("hidden", hidden), ("weight", weight), ("target", target)):
        check_tensor(name, x)
    grad = torch.is_grad_enabled()
    if need is None:
        need = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    tensor = isinstance(alpha, Tensor)
    if not tensor and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise TypeError(f"alpha is of type {type(alpha).__name__}; it must be a float in [0, 1] or a tensor")
    priors = (None, *PriorHead(*prior)) if isinstance(prior, tuple) else (prior, None, None, None)
    priors = [None if x is None else x.detach() for x in priors]
    divergence, smoothing, ignore_index, reduction = options
    loss, belief, fidelity, consistency, *gradients = belief_head(
        hidden, weight, bias, *priors, target.detach(), alpha.detach() if tensor else None,
        0.0 if tensor else float(alpha), divergence, float(smoothing), ignore_index, reduction, return_belief,
        *need, backend, row_scale,
    )  # fmt: skip
    return LocalLoss(loss, belief if return_belief else None, fidelity, consistency), gradients


def _prior(prior, hidden, weight, bias):
    return prior if hidden is None else PriorHead(hidden, weight, bias)


def _belief_head(
    hidden, weight, bias, prior, q_hidden, q_weight, q_bias, target, alpha, alpha_value, divergence, smoothing,
    ignore_index, reduction, return_belief, need_hidden, need_weight, need_bias, backend, row_scale,
):  # fmt: skip
    need = (need_hidden, need_weight, need_bias)
    if reduction == "none" and row_scale is None:
        need = (False,) * 3  # backward calls again, with each row's weight
    result, gradients = dispatch.solve(
        hidden, weight, bias, _prior(prior, q_hidden, q_weight, q_bias), target,
        alpha_value if alpha is None else alpha, (divergence, smoothing, ignore_index, reduction),
        return_belief, need, backend, row_scale,
    )  # fmt: skip
    loss, belief, fidelity, consistency = result
    values = (loss.clone(), belief, fidelity.clone(), consistency.clone())  # outputs may not be views of one another
    return tuple(hidden.new_empty(0) if x is None else x for x in (*values, *gradients))


def _fake(
    hidden, weight, bias, prior, q_hidden, q_weight, q_bias, target, alpha, alpha_value, divergence, smoothing,
    ignore_index, reduction, return_belief, need_hidden, need_weight, need_bias, backend, row_scale,
):  # fmt: skip
    given = _prior(prior, q_hidden, q_weight, q_bias)
    make_head(
        hidden, weight, bias, given, target, alpha_value if alpha is None else alpha, divergence, smoothing,
        ignore_index, reduction, return_belief, False, False,
    )  # fmt: skip
    compute = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    rows = hidden.shape[:-1]
    losses = [hidden.new_empty(rows if reduction == "none" else (), dtype=compute) for _ in range(3)]
    belief = hidden.new_empty(0)
    if return_belief:
        dtype = belief_dtype(hidden.dtype, given, divergence == "reverse")
        belief = hidden.new_empty((*rows, weight.shape[0]), dtype=dtype)
    later = reduction == "none" and row_scale is None
    need = (need_hidden, need_weight, need_bias)
    gradients = [
        x.new_empty(x.shape) if n and not later else hidden.new_empty(0)
        for x, n in zip((hidden, weight, bias), need, strict=True)
    ]
    return losses[0], belief, *losses[1:], *gradients


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.unreduced, ctx.need = inputs[13] == "none", inputs[15:18]
    if ctx.unreduced:
        ctx.save_for_backward(*inputs[:9])
        ctx.rest = inputs[9:15], inputs[18]
    else:
        ctx.save_for_backward(*output[4:])


def _backward(ctx, grad_loss, *_):
    gradients = [None] * 3
    if grad_loss is not None and ctx.unreduced:
        (*options, _), backend = ctx.rest
        gradients = belief_head(*ctx.saved_tensors, *options, False, *ctx.need, backend, grad_loss.detach())[4:]
        if torch.is_grad_enabled():
            one = torch.ones((), device=grad_loss.device)
            gradients = [first_derivative(ctx, x, one, "fused_belief_head") for x in gradients]
    elif grad_loss is not None:
        gradients = all_times(ctx, ctx.saved_tensors, grad_loss, "fused_belief_head")
    gradients = [x if wanted else None for x, wanted in zip(gradients, ctx.need, strict=True)]
    return *gradients, *[None] * (_INPUTS - 3)


for _key in ("CPU", "CUDA"):
    library.impl("belief_head", _belief_head, _key)
torch.library.register_fake("sid_kernels::belief_head", _fake, lib=library)
torch.library.register_autograd("sid_kernels::belief_head", _backward, setup_context=_setup_context, lib=library)
belief_head = torch.ops.sid_kernels.belief_head.default
