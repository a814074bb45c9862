"""Arguments of `refine_cascade` in canonical form, and the results: the one place where both are defined.

`make_problem` looks at metadata only, before anything is computed or written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import as_rows, canonical_target, check_device, check_dtype, check_support, check_tensor, materialize
from ..core.options import LossOptions, LossSpec, check_choice, compute_dtype, make_options

REDUCTIONS = ("mean", "sum")


class CascadeWeights(NamedTuple):
    """Parameters of L equal stages, or their gradients, stacked, each in the layout of `nn.Linear`.

    Stage i computes

    h_i = relu(hidden_weight[i] concat(p_{i-1}, f) + hidden_bias[i]),   z_i = logits_weight[i] h_i + logits_bias[i]
    """

    hidden_weight: Tensor  # (L, H, C + D); the first C columns act on the belief, the others on the features
    hidden_bias: Tensor  # (L, H)
    logits_weight: Tensor  # (L, C, H)
    logits_bias: Tensor  # (L, C)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes L, H and C."""
        stages, classes, hidden_dim = self.logits_weight.shape
        return stages, hidden_dim, classes


class CascadeProblem(NamedTuple):
    """A cascade with contiguous weights and features with adjacent columns."""

    features: Tensor  # f, (B, D)
    weights: CascadeWeights
    prior: Tensor | None  # p_0, (B, C); None: uniform
    spec: LossSpec  # alpha: a float, or (L,), float32 (float64 for float64 features); reduction "mean" or "sum"
    need_grad: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of losses and, for half precision, of gradients: float32, or float64 for float64 features."""
        return compute_dtype(self.features)


class CascadeResult(NamedTuple):
    """Result of a cascade of L stages.

    loss: sum of the stages' local losses, (), in nats; the only differentiable part. float32 (float64 for float64).
    belief: softmax of the last stage's logits, (B, C), in the weights' dtype.
    fidelity, consistency: (L,) each, reduced over rows as those of `fused_local_loss`.
    stage_loss: the local loss of each stage, (L,), reduced in the same way.
    logits: of the last stage, (B, C), in the weights' dtype; their argmax is the network's prediction.
    """

    loss: Tensor
    belief: Tensor
    fidelity: Tensor
    consistency: Tensor
    stage_loss: Tensor
    logits: Tensor


class CascadeActivations(NamedTuple):
    """The factors of the weights' gradients; any strides."""

    dlogits: Tensor  # (L, B, C)
    hidden: Tensor  # h, (L, B, H)
    dhidden: Tensor  # (L, B, H), the gradient at the input of the ReLU


class CascadeOutputs(NamedTuple):
    """What a backend returns for a `CascadeProblem`; any strides."""

    losses: Tensor  # (3, L) float32 or float64: loss, fidelity and consistency of every stage, reduced
    beliefs: Tensor  # (L, B, C) in the weights' dtype
    logits: Tensor  # (B, C) of the last stage, in the weights' dtype
    activations: CascadeActivations | None  # None: no gradients are needed
    last_belief: Tensor | None = None  # (B, C), the last belief in float32, if `beliefs` are rounded
    has_biases: bool = False  # whether the gradients of both biases have been written already
    lift: float = 1.0  # dlogits and dhidden are this many times larger


def cascade_options(*values: object) -> LossOptions:
    """Return `LossOptions(*values)`, whose reduction must be "mean" or "sum"."""
    check_choice("reduction", values[3], REDUCTIONS)
    return make_options(*values)


def make_problem(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor,
    prior: Tensor | None,
    options: LossOptions,
    need_grad: bool,
) -> CascadeProblem:
    """Check the arguments of `refine_cascade`, and return their problem.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    check_tensor("features", features)
    check_dtype("features", features)
    if features.dim() != 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be (B, D)")
    stages, _, classes = check_weights("weights", weights, features)
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
    check_support(options, labels)
    return CascadeProblem(
        as_rows(features.detach(), features.shape[1]),
        CascadeWeights(*(materialize(x.detach()).contiguous() for x in weights)),
        prior,
        LossSpec(labels, soft, _canonical_alpha(alpha, stages, features), options),
        need_grad,
    )


def check_weights(name: str, weights: CascadeWeights, features: Tensor) -> tuple[int, int, int]:
    """Return L, H and C of weights that fit together and the features (B, D)."""
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
    stages, classes, hidden_dim = last.shape
    inputs = classes + features.shape[1]
    shapes = ((stages, hidden_dim, inputs), (stages, hidden_dim), (stages, classes, hidden_dim), (stages, classes))
    for part, x, shape in zip(CascadeWeights._fields, weights, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(x.shape)}; it must be {shape} for L = {stages}, H = {hidden_dim}, "
                f"C = {classes} (from logits_weight) and D = {features.shape[1]} (from features)"
            )
    return stages, hidden_dim, classes


def _check_tuple(name: str, weights: object) -> None:
    """Raise TypeError if `weights` is not a tuple of four tensors."""
    if not isinstance(weights, tuple) or len(weights) != 4:
        raise TypeError(
            f"{name} is of type {type(weights).__name__}; it must be CascadeWeights(hidden_weight, hidden_bias, "
            "logits_weight, logits_bias)"
        )
    for part, x in zip(CascadeWeights._fields, weights, strict=True):
        check_tensor(f"{name}.{part}", x)


def check_kinds(features: object, weights: object) -> None:
    """Raise TypeError if the features or the weights are not tensors, before anything else looks at them."""
    check_tensor("features", features)
    _check_tuple("weights", weights)


def _canonical_alpha(alpha: float | Sequence[float] | Tensor, stages: int, features: Tensor) -> float | Tensor:
    """Return alpha as a float, or as a tensor (L,) on the features' device if the stages differ."""
    if isinstance(alpha, Tensor):
        if not alpha.dtype.is_floating_point:
            raise TypeError(f"alpha has dtype {alpha.dtype}; it must be a floating dtype")
        if alpha.dim() and alpha.shape != (stages,):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must be () or one per stage, ({stages},)")
        check_device("alpha", alpha, features)
        compute = compute_dtype(features)
        return materialize(alpha.detach()).to(compute).expand(stages).contiguous()
    is_sequence = isinstance(alpha, Sequence) and not isinstance(alpha, str)
    values = list(alpha) if isinstance(alpha, Sequence) and is_sequence else [alpha]
    if is_sequence and len(values) != stages:
        raise ValueError(
            f"alpha has {len(values)} values; it must be one number or one for each of the {stages} stages"
        )
    numbers = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            kind = type(value).__name__
            raise TypeError(f"alpha is of type {kind}; it must be a float in [0, 1], one per stage, or a tensor")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"alpha is {value}; it must lie in [0, 1]")
        numbers.append(float(value))
    if len(set(numbers)) == 1:
        return numbers[0]
    return _alpha_tensor(tuple(numbers), features.dtype is torch.float64, features.device)


@functools.cache
def _alpha_tensor(values: tuple[float, ...], double: bool, device: torch.device) -> Tensor:
    """Return the values as a tensor on a device, copied once and kept.

    A copy in every step would wait for the device, and a graph being captured cannot contain one. A captured graph may
    read the tensor at any later time.
    """
    return torch.tensor(values, dtype=torch.float64 if double else torch.float32, device=device)
