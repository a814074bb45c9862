"""The operator `torch.ops.sid_kernels.refine_cascade`: what torch.compile, export and fake tensors see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.autograd import all_times, functorch_stack, is_compiling
from ..core.torch_library import library
from . import dispatch
from .problem import CascadeWeights, make_cascade

library.define(
    "refine_cascade(Tensor features, Tensor hidden_weight, Tensor hidden_bias, Tensor logits_weight, "
    "Tensor logits_bias, Tensor target, Tensor? prior, Tensor? alpha, float[] alpha_values, str divergence, "
    "float label_smoothing, int ignore_index, str reduction, str backend, bool need_grad) "
    "-> (Tensor loss, Tensor stage_loss, Tensor fidelity, Tensor consistency, Tensor belief, Tensor logits, "
    "Tensor dfeatures, Tensor dhidden_weight, Tensor dhidden_bias, Tensor dlogits_weight, Tensor dlogits_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def call(
    features, weights, target, alpha, prior, divergence, smoothing, ignore_index, reduction, backend, need_grad=None
):
    """All results of the operator. `need_grad` None: as autograd wants it. Values of alpha are checked when it runs."""
    if not is_compiling() and functorch_stack() is not None:
        raise RuntimeError("refine_cascade does not take part in torch.func transforms; use torch.autograd")
    if need_grad is None:
        need_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (features, *weights))
    tensor = isinstance(alpha, Tensor)
    values = (
        [] if tensor else [float(x) for x in alpha] if isinstance(alpha, Sequence) else [float(alpha)] * len(weights[0])
    )
    prior, alpha = None if prior is None else prior.detach(), alpha.detach() if tensor else None
    return refine_cascade(
        features, *weights, target.detach(), prior, alpha, values, divergence, float(smoothing),
        ignore_index, reduction, backend, need_grad,
    )  # fmt: skip


def _refine_cascade(
    features,
    w1,
    b1,
    w2,
    b2,
    target,
    prior,
    alpha,
    values,
    divergence,
    smoothing,
    ignore_index,
    reduction,
    backend,
    need_grad,
):
    weights = CascadeWeights(w1, b1, w2, b2)
    alpha = values if alpha is None else alpha
    options = (divergence, smoothing, ignore_index, reduction)
    result, dfeatures, gradients = dispatch.solve(
        features, weights, target, alpha, prior, options, backend, need_grad, need_grad, None
    )
    if need_grad:
        return *_apart(result), dfeatures, *gradients
    return *_apart(result), *(features.new_empty(0) for _ in range(5))


def _apart(result):
    """An operator's outputs may not be views of one another, as the losses of the stages are."""
    return result.loss, *(x.clone() for x in result[1:4]), *result[4:]


def _fake(
    features,
    w1,
    b1,
    w2,
    b2,
    target,
    prior,
    alpha,
    values,
    divergence,
    smoothing,
    ignore_index,
    reduction,
    backend,
    need_grad,
):
    weights = CascadeWeights(w1, b1, w2, b2)
    weight = 0.5 if alpha is None else alpha  # numbers are checked when it runs
    make_cascade(features, weights, target, weight, prior, divergence, smoothing, ignore_index, reduction, need_grad)
    stages, _, classes = weights.sizes
    compute = torch.float64 if features.dtype is torch.float64 else torch.float32
    losses = [features.new_empty(shape, dtype=compute) for shape in ((), (stages,), (stages,), (stages,))]
    last = [features.new_empty(features.shape[0], classes) for _ in range(2)]
    return *losses, *last, *(x.new_empty(x.shape if need_grad else 0) for x in (features, *weights))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[6:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    gradients = [None] * 5
    if grad_loss is not None:
        gradients = all_times(ctx, ctx.saved_tensors, grad_loss, "refine_cascade")
    return *gradients, *[None] * 10


for _key in ("CPU", "CUDA"):
    library.impl("refine_cascade", _refine_cascade, _key)
torch.library.register_fake("sid_kernels::refine_cascade", _fake, lib=library)
torch.library.register_autograd("sid_kernels::refine_cascade", _backward, setup_context=_setup_context, lib=library)
refine_cascade = torch.ops.sid_kernels.refine_cascade.default
