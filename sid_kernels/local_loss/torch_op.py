"""The operator `torch.ops.sid_kernels.local_loss`: the local loss through PyTorch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ..core.autograd import is_compiling, once_differentiable, records_grad, scale_gradients, transforming, transforms
from ..core.checks import check_tensor
from ..core.options import HALF, LossOptions, compute_dtype, make_options
from ..core.torch_library import OPTIONS_SCHEMA, define_function, define_operator, options_arguments, split_alpha
from .backward import compute_dlogits
from .dispatch import run_shaped
from .functional import call_transformed
from .problem import make_problem
from .sharded import call_sharded, is_sharded


def call(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, options: tuple, backend: str,
    need_grad: bool | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (loss, belief, fidelity, consistency, dlogits); dlogits is empty if it is not wanted.

    options: the arguments of `LossOptions`, which the operator checks. need_grad: None: as autograd wants it.
    """
    for name, x in (("logits", logits), ("target", target), *([] if prior is None else [("prior", prior)])):
        check_tensor(name, x)
    if not is_compiling() and is_sharded(logits, prior, target, alpha):
        return call_sharded(logits, prior, target, alpha, options, backend)
    kinds = {x.key() for x in transforms()} if transforming() else set()
    if transforming() and kinds != {TransformType.Functionalize}:
        if TransformType.Functionalize in kinds:
            return _functionalized(logits, prior, target, alpha, options, backend)
        return call_transformed(logits, prior, target, alpha, options, backend)
    prior = None if prior is None else prior.detach()
    if need_grad is None:  # in half precision `backward` computes it, with the incoming gradient
        need_grad = records_grad(logits) and logits.dtype not in HALF
    rest = (*options_arguments(options), backend, need_grad)
    return local_loss(logits, prior, target.detach(), *split_alpha(alpha, logits), *rest)


def _functionalized(logits: Tensor, prior: Tensor | None, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return what `call` does for `functionalize` combined with other transforms, which takes no autograd Function.

    The operator computes values and gradient, and a product that is 0 connects them.
    """
    if sum(x.key() in (TransformType.Grad, TransformType.Jvp) for x in transforms()) > 1:
        raise RuntimeError(
            "fused_local_loss has no second derivative: it was asked for by nested torch.func transforms"
        )
    alpha, options, backend = rest
    constant = logits.detach()
    prior = None if prior is None else prior.detach()
    rest = (*split_alpha(alpha, logits), *options_arguments(options), backend, True)
    loss, *values, dlogits = local_loss(constant, prior, target.detach(), *rest)
    change = torch.where(dlogits == 0, 0.0, dlogits * (logits - constant)).float()
    return loss + (change.sum(-1) if options[3] == "none" else change.sum()), *values, dlogits


def _solve(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, options: LossOptions, backend: str,
    need_grad: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    problem = make_problem(logits, prior, target, alpha, options, need_grad=need_grad)
    return tuple(logits.new_empty(0) if x is None else x for x in run_shaped(problem, backend, logits.shape))


def _run(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: Tensor | None, alpha_value: float, *rest: Any
) -> tuple[Tensor, ...]:
    *options, backend, need_grad = rest
    weight = alpha_value if alpha is None else alpha
    return _solve(logits, prior, target, weight, make_options(*options), backend, need_grad)


def _fake(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: Tensor | None, alpha_value: float, *rest: Any
) -> tuple[Tensor, ...]:
    *values, _, need_grad = rest
    options = make_options(*values)
    make_problem(logits, prior, target, alpha_value if alpha is None else alpha, options)
    dtype = compute_dtype(logits)
    shape = logits.shape[:-1] if options.reduction == "none" else ()
    loss, fidelity, consistency = (logits.new_empty(shape, dtype=dtype) for _ in range(3))
    belief = logits.new_empty(logits.shape, dtype=logits.dtype if prior is None else prior.dtype)
    return loss, belief, fidelity, consistency, logits.new_empty(logits.shape if need_grad else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.half, ctx.arguments = inputs[0].dtype in HALF, len(inputs)
    if ctx.half:
        ctx.save_for_backward(*inputs[:4])
        ctx.alpha_and_options, ctx.backend = inputs[4:9], inputs[9]
    else:
        ctx.save_for_backward(output[4])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.arguments
    if ctx.half:
        with torch.no_grad():
            gradient = local_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.alpha_and_options, ctx.backend)
        if torch.is_grad_enabled():
            gradient = once_differentiable(ctx, gradient, "fused_local_loss")
    else:
        (dlogits,) = ctx.saved_tensors
        (gradient,) = scale_gradients(ctx, (dlogits,), grad_loss, "fused_local_loss", dlogits.dtype)
    return gradient, *[None] * (ctx.arguments - 1)


def _run_backward(
    grad_loss: Tensor, logits: Tensor, prior: Tensor | None, target: Tensor, alpha: Tensor | None, alpha_value: float,
    *rest: Any,
) -> Tensor:  # fmt: skip
    *options, backend = rest
    problem = make_problem(logits, prior, target, alpha_value if alpha is None else alpha, make_options(*options))
    return compute_dlogits(problem, backend, grad_loss, None, keep=True).view(logits.shape)


def _fake_backward(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


local_loss_backward = define_function(
    "local_loss_backward(Tensor grad_loss, Tensor logits, Tensor? prior, Tensor target, Tensor? alpha, "
    f"float alpha_value, {OPTIONS_SCHEMA}, str backend) -> Tensor dlogits",
    _run_backward,
    _fake_backward,
)
local_loss = define_operator(
    f"local_loss(Tensor logits, Tensor? prior, Tensor target, Tensor? alpha, float alpha_value, {OPTIONS_SCHEMA}, "
    "str backend, bool need_grad) "
    "-> (Tensor loss, Tensor belief, Tensor fidelity, Tensor consistency, Tensor dlogits)",
    _run,
    _fake,
    _setup_context,
    _backward,
)
