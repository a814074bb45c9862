"""The operator `torch.ops.sid_kernels.local_loss`: what torch.compile, export and fake tensors see.

It computes what the eager path computes, through the dispatcher. `Library.define`/`impl` rather than
`custom_op`: a third of the overhead a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.autograd import first_derivative, scaled
from ..core.torch_library import library
from . import dispatch
from .problem import Problem, make_problem

library.define(
    "local_loss(Tensor logits, Tensor? prior, Tensor target, Tensor? alpha, float alpha_value, str divergence, "
    "float label_smoothing, int ignore_index, str reduction, str backend, bool need_grad) "
    "-> (Tensor loss, Tensor belief, Tensor fidelity, Tensor consistency, Tensor dlogits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(
    logits, prior, target, alpha, alpha_value, divergence, label_smoothing, ignore_index, reduction, need_grad
) -> Problem:
    weight = alpha_value if alpha is None else alpha
    return make_problem(
        logits, prior, target, weight, divergence, label_smoothing, ignore_index, reduction, None, need_grad
    )


def _local_loss(
    logits: Tensor,
    prior,
    target,
    alpha,
    alpha_value,
    divergence,
    label_smoothing,
    ignore_index,
    reduction,
    backend,
    need_grad,
):
    problem = _problem(
        logits, prior, target, alpha, alpha_value, divergence, label_smoothing, ignore_index, reduction, need_grad
    )
    loss, fidelity, consistency, belief, dlogits = dispatch.run(problem, backend)
    if reduction == "none":
        loss, fidelity, consistency = (x.view(logits.shape[:-1]) for x in (loss, fidelity, consistency))
    dlogits = logits.new_empty(0) if dlogits is None else dlogits.view(logits.shape)
    return loss, belief.view(logits.shape), fidelity, consistency, dlogits


def _fake(
    logits: Tensor,
    prior,
    target,
    alpha,
    alpha_value,
    divergence,
    label_smoothing,
    ignore_index,
    reduction,
    backend,
    need_grad,
):
    _problem(logits, prior, target, alpha, alpha_value, divergence, label_smoothing, ignore_index, reduction, need_grad)
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    loss, fidelity, consistency = (
        logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype) for _ in range(3)
    )
    belief = logits.new_empty(logits.shape, dtype=logits.dtype if prior is None else prior.dtype)
    return loss, belief, fidelity, consistency, logits.new_empty(logits.shape if need_grad else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[4])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    grad = None
    if grad_loss is not None:
        (dlogits,) = ctx.saved_tensors
        grad = (
            first_derivative(ctx, dlogits, grad_loss, "fused_local_loss")
            if torch.is_grad_enabled()
            else scaled(dlogits, grad_loss)
        )
    return grad, None, None, None, None, None, None, None, None, None, None


for _key in ("CPU", "CUDA"):
    library.impl("local_loss", _local_loss, _key)
torch.library.register_fake("sid_kernels::local_loss", _fake, lib=library)
torch.library.register_autograd("sid_kernels::local_loss", _backward, setup_context=_setup_context, lib=library)
local_loss = torch.ops.sid_kernels.local_loss.default
