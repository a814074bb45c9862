"""The public operations `fused_local_loss` (differentiable) and `local_loss_and_grad` (returns the gradient).

This file chooses between the direct call and the operator of `local_loss/torch_op.py`, and holds the autograd Function.
It computes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .core.autograd import apply_of, attach, first_derivative, needs_operator, overrides, scale_gradient, wants_grad
from .core.options import DEFAULTS, HALF, OPTION_NAMES, make_options
from .local_loss import cpu, torch_op
from .local_loss.backward import AttachHalf, computes_ahead, keeps_float32
from .local_loss.dispatch import run_shaped
from .local_loss.problem import LocalLoss, check_out_like, make_problem

_DEFAULTS = dataclasses.astuple(DEFAULTS)


def fused_local_loss(
    logits: Tensor,
    prior: Tensor | None,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> LocalLoss:
    """Compute the local loss of one SID stage, its belief, and its gradient for `backward` (arXiv 2510.03273).

    forward: L = alpha CE(y, p) + (1 - alpha) KL(q || p),  dL/dz = (alpha Y + (1 - alpha) S) p - alpha y - (1 - alpha) q
    reverse: L = alpha KL(p || y) + (1 - alpha) KL(p || q),  dL/dz = p (u - sum p u)
    with p = softmax(z), Y = sum y, S = sum q, u = log p - alpha log y - (1 - alpha) log q.

    Args:
        logits: z, (..., C), float32, bfloat16 or float16 (float64 on the reference backend). Sums are in float32.
        prior: q, (..., C) class probabilities, or None for the uniform prior (no memory is read). A constant.
        target: y, integer labels (...) or class probabilities (..., C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, or a tensor () or (...) on the logits' device.
        divergence: "forward" or "reverse"; reverse with labels needs label_smoothing > 0.
        label_smoothing: s in [0, 1], y <- (1 - s) y + s / C.
        ignore_index: rows with this label have loss 0 and gradient 0; "mean" divides by the number of other rows.
        reduction: "none", "mean" or "sum".
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    The first derivative is available in reverse and forward mode, to torch.func transforms and to tracers; a second one
    raises. In half precision the gradient is rounded once, after the incoming gradient has multiplied it; logits, prior
    and target must not change in place before `backward`. DTensors of one mesh may shard rows and classes.

    A class with logit -inf is masked. It contributes nothing if prior and target give it probability 0 (0 log 0 = 0),
    and makes the loss infinite if they do not. A NaN affects its own row only.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's loss and gradient are NaN, without a
            synchronization; SID_KERNELS_DEBUG=1 synchronizes and raises.
        RuntimeError: the backend cannot be used here, or a second derivative is asked for.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    if needs_operator(logits, prior, target, alpha):
        if handlers := overrides(logits, prior, target, alpha):
            kwargs = dict(zip(OPTION_NAMES, options, strict=True), backend=backend)
            return handle_torch_function(fused_local_loss, handlers, logits, prior, target, alpha, **kwargs)
        return LocalLoss(*torch_op.call(logits, prior, target, alpha, options, backend)[:4])
    outputs = cpu.run_ordinary(logits, prior, target, alpha) if backend == "auto" and options == _DEFAULTS else None
    if outputs is None:
        need_grad = wants_grad(logits)
        problem = make_problem(logits, prior, target, alpha, make_options(*options), need_grad=need_grad)
        half = need_grad and logits.dtype in HALF
        wide = half and keeps_float32(problem)
        if wide:
            problem = problem._replace(out=torch.empty(problem.logits.shape, dtype=torch.float32))
        elif half:
            problem = problem._replace(need_grad=computes_ahead(problem, backend))
        outputs = run_shaped(problem, backend, logits.shape)
        if half:
            loss, belief, fidelity, consistency, gradient = outputs
            if wide:
                assert gradient is not None
                loss = attach("fused_local_loss", loss, (gradient.view(logits.shape),), (logits,))
            else:
                loss = _attach_half(logits, (loss, gradient), problem, backend)
            return LocalLoss(loss, belief, fidelity, consistency)
    loss, belief, fidelity, consistency, dlogits = outputs
    if logits.requires_grad and torch.is_grad_enabled():
        loss = _attach(logits, (loss, dlogits))
    return LocalLoss(loss, belief, fidelity, consistency)


def local_loss_and_grad(
    logits: Tensor,
    prior: Tensor | None,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    out: Tensor | None = None,
) -> tuple[LocalLoss, Tensor]:
    """Compute `fused_local_loss` without autograd: return (LocalLoss, dlogits), for `logits.backward(dlogits)`.

    dlogits: (..., C) in the logits' dtype, the gradient of the reduced loss ("none": of the sum).
    out: memory for dlogits, of the logits' shape, dtype and device; `out=logits` overwrites the logits.
    The other arguments, the values and the errors are those of `fused_local_loss`.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    if needs_operator(logits, prior, target, alpha, out):
        if handlers := overrides(logits, prior, target, alpha, out):
            kwargs = dict(zip(OPTION_NAMES, options, strict=True), backend=backend, out=out)
            return handle_torch_function(local_loss_and_grad, handlers, logits, prior, target, alpha, **kwargs)
        logits = logits.detach() if isinstance(logits, Tensor) else logits
        if out is not None:
            check_out_like(out, logits)
        *values, dlogits = torch_op.call(logits, prior, target, alpha, options, backend, need_grad=True)
        if out is not None:
            out.detach().copy_(dlogits)
        return LocalLoss(*values), dlogits if out is None else out
    outputs = None
    if backend == "auto" and options == _DEFAULTS:
        outputs = cpu.run_ordinary(logits, prior, target, alpha, out)
    if outputs is None:
        problem = make_problem(logits, prior, target, alpha, make_options(*options), out=out)
        outputs = run_shaped(problem, backend, logits.shape)
    loss, belief, fidelity, consistency, gradient = outputs
    if out is not None:
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # a backward pass that saved these logits must notice
        gradient = out
    assert gradient is not None
    return LocalLoss(loss, belief, fidelity, consistency), gradient


class _Attach(torch.autograd.Function):
    """Attach one computed gradient to a computed loss, faster than `core.autograd.attach`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss_and_grad: tuple[Tensor, Tensor]) -> Tensor:
        loss, dlogits = loss_and_grad
        ctx.save_for_backward(dlogits)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return None, None
        (dlogits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative(ctx, dlogits, grad_loss, "fused_local_loss"), None
        return scale_gradient(dlogits, grad_loss), None


_attach, _attach_half = apply_of(_Attach), apply_of(AttachHalf)
