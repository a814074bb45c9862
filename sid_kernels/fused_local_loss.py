"""The public operations: `fused_local_loss` (differentiable) and `local_loss_and_grad` (gradient in hand).

This file chooses between the plain call and the operator of `local_loss/torch_op.py`, and holds the autograd Function.
It computes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .core.autograd import first_derivative, functorch_stack, is_compiling, needs_operator, times
from .core.checks import check_tensor
from .local_loss import cpu, dispatch, torch_op
from .local_loss.problem import LocalLoss, Problem, check_out_like, make_problem

_DEFAULTS = ("forward", 0.0, -100, "mean", "auto")


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
    """Local loss of one SID stage, its belief, and (in backward, already computed) its gradient.

    forward: L = alpha CE(y, p) + (1 - alpha) KL(q || p),  dL/dz = (alpha Y + (1 - alpha) S) p - alpha y - (1 - alpha) q
    reverse: L = alpha KL(p || y) + (1 - alpha) KL(p || q),  dL/dz = p (u - sum p u)
    with p = softmax(z), Y = sum y, S = sum q, u = log p - alpha log y - (1 - alpha) log q (arXiv 2510.03273).

    Args:
        logits: z, (..., C), float32, bfloat16 or float16 (float64 on the reference backend). Sums are in float32.
        prior: q, (..., C) class probabilities, or None for the uniform prior (no memory is read). A constant.
        target: y, integer labels (...) or class probabilities (..., C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, or a tensor () or (...) on the logits' device.
        divergence: "forward" or "reverse"; reverse with labels needs label_smoothing > 0.
        label_smoothing: s in [0, 1], y <- (1 - s) y + s / C.
        ignore_index: rows with this label have loss 0 and gradient 0; "mean" divides by the rows that count.
        reduction: "none", "mean" or "sum".
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    A class with logit -inf is masked: it counts nothing where prior and target give it no mass (0 log 0 = 0), and
    makes the loss infinite where they do. A NaN stays in its row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's loss and gradient are NaN, without a
            synchronisation; SID_KERNELS_DEBUG=1 synchronises and raises.
        RuntimeError: the backend asked for cannot be used here; or a second derivative is asked for.
    """
    if needs_operator(logits, prior, target, alpha):
        differentiable = isinstance(logits, Tensor) and logits.requires_grad and torch.is_grad_enabled()
        outputs = _through_operator(
            logits, prior, target, alpha, divergence, label_smoothing, ignore_index, reduction, backend, differentiable
        )
        return LocalLoss(*outputs[:4])
    if (divergence, label_smoothing, ignore_index, reduction, backend) == _DEFAULTS:
        if (quick := cpu.run_ordinary(logits, prior, target, alpha)) is not None:
            loss, fidelity, consistency, belief, dlogits = quick
            if logits.requires_grad and torch.is_grad_enabled():
                loss = _attach(logits, (loss, dlogits))
            return LocalLoss(loss, belief, fidelity, consistency)
    differentiable = isinstance(logits, Tensor) and logits.requires_grad and torch.is_grad_enabled()
    problem = make_problem(
        logits, prior, target, alpha, divergence, label_smoothing, ignore_index, reduction, None, differentiable
    )
    if not differentiable:
        return _run(problem, backend, logits.shape)[0]
    with torch.no_grad():
        result, dlogits = _run(problem, backend, logits.shape)
    return LocalLoss(_attach(logits, (result.loss, dlogits)), *result[1:])


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
    """`fused_local_loss` without autograd: (LocalLoss, dlogits), for `logits.backward(dlogits)`.

    dlogits: (..., C) in the logits' dtype, the gradient of the reduced loss ("none": of the sum).
    out: where dlogits is written, like logits in shape, dtype and device; `out=logits` overwrites the logits.
    The other arguments, the values and the errors are those of `fused_local_loss`.
    """
    if needs_operator(logits, prior, target, alpha, out):
        logits = logits.detach() if isinstance(logits, Tensor) else logits
        if out is not None:
            check_out_like(out, logits)
        outputs = _through_operator(
            logits, prior, target, alpha, divergence, label_smoothing, ignore_index, reduction, backend, True
        )
        if out is not None:
            out.detach().copy_(outputs[4])
        return LocalLoss(*outputs[:4]), outputs[4] if out is None else out
    if out is None and (divergence, label_smoothing, ignore_index, reduction, backend) == _DEFAULTS:
        if (quick := cpu.run_ordinary(logits, prior, target, alpha)) is not None:
            loss, fidelity, consistency, belief, dlogits = quick
            return LocalLoss(loss, belief, fidelity, consistency), dlogits
    with torch.no_grad():
        problem = make_problem(
            logits, prior, target, alpha, divergence, label_smoothing, ignore_index, reduction, out, True
        )
        result, dlogits = _run(problem, backend, logits.shape)
    if out is None:
        return result, dlogits
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # whoever saved these logits for a backward pass learns of it
    return result, out


def _run(problem: Problem, backend: str, shape: torch.Size) -> tuple[LocalLoss, Tensor | None]:
    """Run in canonical form, give back in the caller's shape."""
    loss, fidelity, consistency, belief, dlogits = dispatch.run(problem, backend)
    if len(shape) != 2:
        if problem.reduction == "none":
            loss, fidelity, consistency = (x.view(shape[:-1]) for x in (loss, fidelity, consistency))
        belief = belief.view(shape)
        if dlogits is not None and problem.out is None:
            dlogits = dlogits.view(shape)
    return LocalLoss(loss, belief, fidelity, consistency), dlogits


class _Attach(torch.autograd.Function):
    """Makes a loss that is already there a function of the logits, with the gradient that is already there."""

    @staticmethod
    def forward(ctx, logits, loss_and_grad):
        ctx.save_for_backward(loss_and_grad[1])
        ctx.set_materialize_grads(False)
        return loss_and_grad[0]

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return None, None
        (dlogits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative(ctx, dlogits, grad_loss, "fused_local_loss"), None
        return times(dlogits, grad_loss), None


# Function.apply looks for functorch transforms and setup_context first, which costs a fifth of a small call.
# Under functorch the operator has been taken, and there is no setup_context.
_attach = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Attach)


class _Functional(torch.autograd.Function):
    """The form torch.func's transforms ask of a Function: they hand `forward` the plain tensors inside their own."""

    @staticmethod
    def forward(logits, prior, target, alpha, options):
        *options, backend = options
        result, dlogits = _run(make_problem(logits, prior, target, alpha, *options, None, True), backend, logits.shape)
        return *result, dlogits.view(logits.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[4])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return first_derivative(ctx, ctx.saved_tensors[0], grad_loss, "fused_local_loss"), None, None, None, None


def _through_operator(
    logits, prior, target, alpha, divergence, label_smoothing, ignore_index, reduction, backend, need_grad
) -> tuple[Tensor, ...]:
    for name, x in (("logits", logits), ("target", target), *([] if prior is None else [("prior", prior)])):
        check_tensor(name, x)
    if not is_compiling() and functorch_stack() is not None:
        options = (divergence, label_smoothing, ignore_index, reduction, backend)
        return _Functional.apply(logits, prior, target, alpha, options)
    tensor = isinstance(alpha, Tensor)
    if not tensor and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise TypeError(f"alpha is of type {type(alpha).__name__}; it must be a float in [0, 1] or a tensor")
    detached = None if prior is None else prior.detach()
    return torch_op.local_loss(
        logits,
        detached,
        target.detach(),
        alpha.detach() if tensor else None,
        0.0 if tensor else float(alpha),
        divergence,
        float(label_smoothing),
        ignore_index,
        reduction,
        backend,
        need_grad,
    )
