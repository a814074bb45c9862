"""The public operations `refine_cascade` (differentiable) and `refine_cascade_and_grad` (gradients in hand).

This file chooses between the plain call and the operator of `cascade/torch_op.py`. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cascade import dispatch, torch_op
from .cascade.problem import CascadeResult, CascadeWeights, check_kinds
from .core.autograd import attach, autocast_dtype, needs_operator


def refine_cascade(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor = 0.5,
    *,
    prior: Tensor | None = None,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> CascadeResult:
    """L equal belief stages that read the same features (the "shared" layout), each with its own local loss.

    With f the features and p_0 the prior, stage i = 1..L computes

        h_i = relu(hidden_weight[i] concat(p_{i-1}, f) + hidden_bias[i]),  z_i = logits_weight[i] h_i + logits_bias[i]
        p_i = softmax(z_i),  L_i = alpha_i CE(y, p_i) + (1 - alpha_i) KL(p_{i-1} || p_i)       (arXiv 2510.03273)

    and no gradient flows from a stage to the one before it: the result is that of calling `fused_local_loss` stage by
    stage with a `detach` between them. All gradients are computed with the loss; `backward` hands them out. The memory
    held meanwhile does not grow with L beyond 16 MiB (or what one stage needs, if that is more).

    Args:
        features: f, (B, D), float32, bfloat16 or float16 (float64: stage by stage). Differentiable.
        weights: CascadeWeights of the L stages, stacked, in the features' dtype. Differentiable.
        target: y, integer labels (B,) or class probabilities (B, C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, L floats, or a tensor () or (L,).
        prior: p_0, (B, C), in the features' dtype, or None for the uniform belief. A constant.
        divergence, label_smoothing, ignore_index: as in `fused_local_loss`.
        reduction: "mean" or "sum", over rows.
        backend: "auto", "reference", "cpu", "cuda" or "triton". Where no kernel of it takes the whole cascade, its
            stages run one by one with that backend's fused local loss.

    Under autocast on a GPU the products run in autocast's dtype, as `nn.Linear`'s do; on a CPU in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's losses and gradients are NaN.
        RuntimeError: the backend asked for cannot be used here; or a second derivative is asked for.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    check_kinds(features, weights)
    if (dtype := autocast_dtype(features)) is not None:
        dtype = dtype if features.is_cuda else torch.float32
        features, weights = features.to(dtype), CascadeWeights(*(x.to(dtype) for x in weights))
        prior = prior.to(dtype) if isinstance(prior, Tensor) and prior.is_floating_point() else prior
    if needs_operator(features, *weights, target, prior, alpha):
        return CascadeResult(*torch_op.call(features, weights, target, alpha, prior, *options, backend)[:6])
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (features, *weights))
    result, dfeatures, gradients = dispatch.solve(
        features, weights, target, alpha, prior, options, backend, wanted, wanted and features.requires_grad, None
    )
    if not wanted:
        return result
    return result._replace(loss=attach("refine_cascade", result.loss, (dfeatures, *gradients), (features, *weights)))


def refine_cascade_and_grad(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor = 0.5,
    *,
    prior: Tensor | None = None,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    need_features: bool = True,
    out: CascadeWeights | None = None,
) -> tuple[CascadeResult, Tensor | None, CascadeWeights]:
    """`refine_cascade` without autograd: (CascadeResult, dfeatures (B, D), gradients of the weights).

    `out`: where the weights' gradients go (contiguous, like the weights, memory of their own); None: new memory.
    `need_features=False` leaves out the gradient of the features, which is then None. Autocast is not
    looked at. Raises as `refine_cascade` does.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    check_kinds(features, weights)
    if needs_operator(features, *weights, target, prior, alpha):
        found = torch_op.call(features, weights, target, alpha, prior, *options, backend, need_grad=True)
        found = [x.detach() for x in found]
        gradients = CascadeWeights(*found[7:])
        if out is not None:
            gradients = CascadeWeights(*(own.copy_(x) for own, x in zip(out, gradients, strict=True)))
        return CascadeResult(*found[:6]), found[6] if need_features else None, gradients
    return dispatch.solve(features, weights, target, alpha, prior, options, backend, True, need_features, out)
