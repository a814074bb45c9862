"""The operator `torch.ops.sid_kernels.cascade`: the cascade through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import is_compiling, records_grad
from ..core.options import compute_dtype
from ..core.torch_library import (
    OPTIONS_SCHEMA,
    count_flops,
    define_operator,
    gradients_in_outputs,
    options_arguments,
    refuse_functorch,
    split_alpha,
)
from .dispatch import solve
from .problem import CascadeWeights, cascade_options, make_problem


def call(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor,
    prior: Tensor | None,
    options: tuple,
    backend: str,
    need_grad: bool | None = None,
) -> list[Tensor]:
    """Return the fields of `CascadeResult`, then the gradients of features and weights, empty if not wanted.

    options: the arguments of `LossOptions`, which the operator checks, as it checks values of alpha. need_grad: None:
    as autograd wants it.
    """
    refuse_functorch("refine_cascade")
    if need_grad is None:
        need_grad = records_grad(features, *weights)
    tensor, values = None, []
    if isinstance(alpha, Sequence):
        if is_compiling():
            parts = [split_alpha(x, features)[0] for x in alpha]
            tensor = torch.stack([x for x in parts if x is not None])
        else:
            values = [float(x) for x in alpha]
    else:
        tensor, value = split_alpha(alpha, features)
        values = [value] * weights[0].shape[0] if tensor is None else []
    prior = None if prior is None else prior.detach()
    rest = (*options_arguments(options), backend, need_grad)
    return cascade(features, *weights, target.detach(), prior, tensor, values, *rest)


def _run(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (target, prior, alpha, values, *rest) = CascadeWeights(*arguments[:4]), arguments[4:]
    *options, backend, need_grad = rest
    alpha, need = values if alpha is None else alpha, (need_grad, need_grad)
    result, dfeatures, gradients = solve(
        features, weights, target, alpha, prior, cascade_options(*options), backend, need
    )
    loss, belief, *losses, logits = result
    results = (loss, belief, *(x.clone() for x in losses), logits)  # outputs may not be views of one another
    if dfeatures is None or gradients is None:
        return *results, *(loss.new_empty(0) for _ in range(5))
    return *results, dfeatures, *gradients


def _fake(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (target, prior, alpha, _, *rest) = CascadeWeights(*arguments[:4]), arguments[4:]
    *options, _, need_grad = rest
    weight = 0.5 if alpha is None else alpha  # numbers are checked when it runs
    make_problem(features, weights, target, weight, prior, cascade_options(*options), need_grad)
    stages, _, classes = weights.sizes
    compute = compute_dtype(features)
    loss = features.new_empty((), dtype=compute)
    fidelity, consistency, stage_loss = (features.new_empty(stages, dtype=compute) for _ in range(3))
    belief, logits = (features.new_empty(features.shape[0], classes) for _ in range(2))
    gradients = (x.new_empty(x.shape if need_grad else 0, dtype=compute) for x in (features, *weights))
    return loss, belief, fidelity, consistency, stage_loss, logits, *gradients


cascade = define_operator(
    "cascade(Tensor features, Tensor hidden_weight, Tensor hidden_bias, Tensor logits_weight, "
    f"Tensor logits_bias, Tensor target, Tensor? prior, Tensor? alpha, float[] alpha_values, {OPTIONS_SCHEMA}, "
    "str backend, bool need_grad) "
    "-> (Tensor loss, Tensor belief, Tensor fidelity, Tensor consistency, Tensor stage_loss, Tensor logits, "
    "Tensor dfeatures, Tensor dhidden_weight, Tensor dhidden_bias, Tensor dlogits_weight, Tensor dlogits_bias)",
    _run,
    _fake,
    *gradients_in_outputs("refine_cascade", 6),
)


def _flops(features: tuple, hidden_weight: tuple, hidden_bias: Any, logits_weight: tuple, *rest: Any) -> int:
    """Count the two products of every stage, and with gradients those of both weights, the hidden and the features."""
    rows, features_dim = features
    stages, hidden_dim, inputs = hidden_weight
    classes, need_grad = logits_weight[1], rest[-1]
    first, second = hidden_dim * inputs, hidden_dim * classes
    gradients = first + 2 * second + hidden_dim * features_dim if need_grad else 0
    return 2 * rows * stages * (first + second + gradients)


count_flops(cascade, _flops)
