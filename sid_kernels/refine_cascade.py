"""The public operations `refine_cascade` (differentiable) and `refine_cascade_and_grad` (returns the gradients).

This file chooses between the direct call and the operator of `cascade/torch_op.py`. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .cascade import torch_op
from .cascade.dispatch import solve
from .cascade.problem import CascadeResult, CascadeWeights, cascade_options, check_kinds
from .cascade.unfused import refuse_sharded, stage_by_stage
from .core.autograd import attach, autocast_dtype, needs_operator, overrides, transforming, wants_grad
from .core.options import OPTION_NAMES


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
    """Compute L equal belief stages that read the same features (the "shared" layout), each with its own local loss.

    With f the features and p_0 the prior, stage i = 1..L computes

        h_i = relu(hidden_weight[i] concat(p_{i-1}, f) + hidden_bias[i]),  z_i = logits_weight[i] h_i + logits_bias[i]
        p_i = softmax(z_i),  L_i = alpha_i CE(y, p_i) + (1 - alpha_i) KL(p_{i-1} || p_i)       (arXiv 2510.03273)

    and no gradient flows from a stage to the previous one: the result is that of calling `fused_local_loss` stage by
    stage with a `detach` between stages. All gradients are computed with the loss, and `backward` returns them. The
    memory held meanwhile does not grow with L beyond 16 MiB (or what one stage needs, if that is more).

    Args:
        features: f, (B, D), float32, bfloat16 or float16 (float64: stage by stage). Differentiable.
        weights: CascadeWeights of the L stages, stacked, in the features' dtype. Differentiable.
        target: y, integer labels (B,) or class probabilities (B, C). A constant.
        alpha: weight of fidelity against consistency in [0, 1]: a float, L floats, or a tensor () or (L,).
        prior: p_0, (B, C), in the features' dtype, or None for the uniform belief. A constant.
        reduction: "mean" or "sum", over rows.
        backend: "auto", "reference", "cpu", "cuda" or "triton". If it has no kernel that takes the whole cascade, the
            stages run one by one with its local loss.

    torch.func transforms and forward-mode differentiation run the stages one by one. In half precision the gradients
    are kept in float32 until `backward` rounds them, once.

    The other options are those of `fused_local_loss`. Under autocast the products run in autocast's dtype on a GPU, as
    in `nn.Linear`, and in float32 on a CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, before anything is run.
        IndexError: a label out of range, on a CPU. On CUDA that row's losses and gradients are NaN.
        RuntimeError: the backend cannot be used here, or a second derivative is asked for.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    if not isinstance(features, Tensor) and (handlers := overrides(features)):
        return handle_torch_function(
            refine_cascade, handlers, features, weights, target, alpha, prior=prior, backend=backend,
            **dict(zip(OPTION_NAMES, options, strict=True)),
        )  # fmt: skip
    check_kinds(features, weights)
    if (dtype := autocast_dtype(features)) is not None:
        dtype = dtype if features.is_cuda else torch.float32
        features, weights = features.to(dtype), CascadeWeights(*(x.to(dtype) for x in weights))
        prior = prior.to(dtype) if isinstance(prior, Tensor) and prior.is_floating_point() else prior
    if needs_operator(features, *weights, target, prior, alpha):
        refuse_sharded(features, *weights, target, prior)
        if transforming():
            return stage_by_stage(features, CascadeWeights(*weights), target, alpha, prior, options, backend)
        return CascadeResult(*torch_op.call(features, weights, target, alpha, prior, options, backend)[:6])
    need_grad = wants_grad(features, *weights)
    need = (need_grad, need_grad and features.requires_grad)
    result, dfeatures, gradients = solve(
        features, weights, target, alpha, prior, cascade_options(*options), backend, need
    )
    if gradients is None:
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
    """Compute `refine_cascade` without autograd: return (CascadeResult, dfeatures (B, D), gradients of the weights).

    out: memory for the gradients of the weights, contiguous, like the weights; None: new memory. need_features: if
    False, dfeatures is not computed and is None. Autocast has no effect. The other arguments and the errors are those
    of `refine_cascade`.
    """
    options = (divergence, label_smoothing, ignore_index, reduction)
    check_kinds(features, weights)
    if not needs_operator(features, *weights, target, prior, alpha):
        result, dfeatures, gradients = solve(
            features, weights, target, alpha, prior, cascade_options(*options), backend, (True, need_features), out
        )
        assert gradients is not None
        dfeatures = None if dfeatures is None else dfeatures.to(features.dtype)
        if out is None:
            gradients = CascadeWeights(*(x.to(features.dtype) for x in gradients))
        return result, dfeatures, gradients
    refuse_sharded(features, *weights, target, prior)
    outputs = torch_op.call(features, weights, target, alpha, prior, options, backend, need_grad=True)
    outputs = [x.detach() for x in outputs]
    outputs[6:] = [x.to(features.dtype) for x in outputs[6:]]
    gradients = CascadeWeights(*outputs[7:])
    if out is not None:
        gradients = CascadeWeights(*(x.copy_(gradient) for x, gradient in zip(out, gradients, strict=True)))
    return CascadeResult(*outputs[:6]), outputs[6] if need_features else None, gradients
