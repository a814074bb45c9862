"""What a caller of `refine_cascade` may pass and what every backend gets: the one place where it is checked.

`make_cascade` looks at metadata only, before anything is computed or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import (
    DTYPES,
    as_rows,
    canonical_target,
    check_device,
    check_tensor,
)
from ..local_loss.problem import check_options, check_support

REDUCTIONS = ("mean", "sum")


class CascadeWeights(NamedTuple):
    """Parameters of L equal stages, or their gradients. Stage i computes

        h_i = relu(hidden_weight[i] concat(p_{i-1}, f) + hidden_bias[i]),   z_i = logits_weight[i] h_i + logits_bias[i]

    which is `nn.Linear`'s own layout, L of them stacked.
    """

    hidden_weight: Tensor  # (L, H, C + D); the first C columns act on the belief, the others on the features
    hidden_bias: Tensor  # (L, H)
    logits_weight: Tensor  # (L, C, H)
    logits_bias: Tensor  # (L, C)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """L, H, C."""
        stages, classes, width = self.logits_weight.shape
        return stages, width, classes


class CascadeProblem(NamedTuple):
    """The operation in canonical form: contiguous weights, features with unit column stride."""

    features: Tensor  # f, (B, D)
    weights: CascadeWeights
    prior: Tensor | None  # p_0, (B, C); None: uniform
    labels: Tensor | None  # (B,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (B, C)
    alpha: float | Tensor  # tensor: (L,), float32 (float64 for float64 features), on the features' device
    reverse: bool
    label_smoothing: float
    ignore_index: int
    reduction: str  # "mean" or "sum"
    need_grad: bool


class CascadeResult(NamedTuple):
    """Result of a cascade of L stages.

    loss: sum of the stages' local losses, (), in nats; the only differentiable part. float32 (float64 for float64).
    stage_loss, fidelity, consistency: (L,) each, reduced over rows like the fused local loss's.
    belief: of the last stage, (B, C), in the weights' dtype.
    logits: of the last stage, (B, C), likewise; their argmax is the network's answer.
    """

    loss: Tensor
    stage_loss: Tensor
    fidelity: Tensor
    consistency: Tensor
    belief: Tensor
    logits: Tensor


class CascadePass(NamedTuple):
    """What a backend returns for a `CascadeProblem`: all that runs along the cascade. Any strides."""

    losses: Tensor  # (3, L) float32 or float64: loss, fidelity and consistency of every stage, reduced
    beliefs: Tensor  # (L, B, C) in the weights' dtype
    logits: Tensor  # (B, C) of the last stage, likewise
    dlogits: Tensor | None  # (L, B, C); this and what follows: where gradients are wanted
    hidden: Tensor | None  # h, (L, B, H)
    dhidden: Tensor | None  # (L, B, H), the gradient at the ReLU's input
    carry: Tensor | None = None  # the last belief in float32, where `beliefs` are rounded
    has_biases: bool = False  # whether the gradients of both biases have been written already


def make_cascade(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor,
    prior: Tensor | None,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    need_grad: bool,
) -> CascadeProblem:
    check_tensor("features", features)
    if features.dtype not in DTYPES:
        raise TypeError(f"features has dtype {features.dtype}; it must be float32, bfloat16, float16 or float64")
    if features.dim() != 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be (B, D)")
    stages, _, classes = check_weights("weights", weights, features)
    check_options(divergence, label_smoothing, ignore_index, reduction, REDUCTIONS)
    shape = torch.Size((features.shape[0], classes))
    if prior is not None:
        check_tensor("prior", prior)
        if prior.shape != shape or prior.dtype != features.dtype:
            raise ValueError(
                f"prior has shape {tuple(prior.shape)} and dtype {prior.dtype}; it must be (B, C) = {tuple(shape)}, "
                f"{features.dtype}"
            )
        check_device("prior", prior, features)
        prior = as_rows(prior.detach(), classes)
    labels, soft = canonical_target(target, features, shape)
    check_support(divergence, label_smoothing, labels)
    return CascadeProblem(
        as_rows(features.detach(), features.shape[1]),
        CascadeWeights(*(x.detach() if x.is_contiguous() else x.detach().contiguous() for x in weights)),
        prior,
        labels,
        soft,
        _alphas(alpha, stages, features),
        divergence == "reverse",
        float(label_smoothing),
        ignore_index,
        reduction,
        need_grad,
    )


def check_weights(name: str, weights: CascadeWeights, features: Tensor) -> tuple[int, int, int]:
    """L, H and C of weights that fit together and the features (B, D)."""
    _check_tuple(name, weights)
    weights = CascadeWeights(*weights)
    for part, x in zip(CascadeWeights._fields, weights, strict=True):
        if x.dtype != features.dtype:
            raise TypeError(f"{name}.{part} has dtype {x.dtype}; it must be the features' dtype, {features.dtype}")
        if x.device != features.device:
            raise ValueError(f"{name}.{part} is on {x.device}; it must be on the features' device, {features.device}")
    last = weights.logits_weight
    if last.dim() != 3 or 0 in last.shape:
        raise ValueError(f"{name}.logits_weight has shape {tuple(last.shape)}; it must be (L, C, H), none of them 0")
    stages, classes, width = last.shape
    inputs = classes + features.shape[1]
    wanted = ((stages, width, inputs), (stages, width), (stages, classes, width), (stages, classes))
    for part, x, shape in zip(CascadeWeights._fields, weights, wanted, strict=True):
        if x.shape != shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(x.shape)}; it must be {shape} for L = {stages}, H = {width}, "
                f"C = {classes} (from logits_weight) and D = {features.shape[1]} (from features)"
            )
    return stages, width, classes


def _check_tuple(name: str, weights: object) -> None:
    if not isinstance(weights, tuple) or len(weights) != 4:
        raise TypeError(
            f"{name} is of type {type(weights).__name__}; it must be CascadeWeights(hidden_weight, hidden_bias, "
            "logits_weight, logits_bias)"
        )
    for part, x in zip(CascadeWeights._fields, weights, strict=True):
        check_tensor(f"{name}.{part}", x)


def check_kinds(features: object, weights: object) -> None:
    """That both are tensors, and as many as they must be: what is looked at before anything else is."""
    check_tensor("features", features)
    _check_tuple("weights", weights)


def _alphas(alpha: float | Sequence[float] | Tensor, stages: int, features: Tensor) -> float | Tensor:
    if isinstance(alpha, Tensor):
        if not alpha.dtype.is_floating_point:
            raise TypeError(f"alpha has dtype {alpha.dtype}; it must be a floating dtype")
        if alpha.dim() and alpha.shape != (stages,):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must be () or one a stage, ({stages},)")
        check_device("alpha", alpha, features)
        compute = torch.float64 if features.dtype is torch.float64 else torch.float32
        return alpha.detach().to(compute).expand(stages).contiguous()
    several = isinstance(alpha, Sequence) and not isinstance(alpha, str)
    values = list(alpha) if several else [alpha]
    if several and len(values) != stages:
        raise ValueError(
            f"alpha has {len(values)} values; it must be one number or one for each of the {stages} stages"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            kind = type(value).__name__
            raise TypeError(f"alpha is of type {kind}; it must be a float in [0, 1], one a stage, or a tensor")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"alpha is {value}; it must lie in [0, 1]")
    if len(set(values)) == 1:
        return float(values[0])
    return _alpha_tensor(tuple(map(float, values)), features.dtype is torch.float64, features.device)


_alpha_tensors: dict[tuple, Tensor] = {}


def _alpha_tensor(values: tuple[float, ...], double: bool, device: torch.device) -> Tensor:
    """Copied to a device once: a copy from the host at every step would wait for it, and cannot be captured. Kept for
    good: a captured graph may read it."""
    key = (values, double, device)
    if key not in _alpha_tensors:
        _alpha_tensors[key] = torch.tensor(values, dtype=torch.float64 if double else torch.float32, device=device)
    return _alpha_tensors[key]
