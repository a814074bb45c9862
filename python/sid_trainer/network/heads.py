"""Heads: the modules that turn features and the preceding belief into one stage's logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_kernels import CascadeWeights

StageCall = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # features, prior -> this stage's features, logits


class FeaturePooling(nn.Sequential):
    """Pool features of one shape to vectors (B, `dim`): average grid cells, or normalize and average tokens.

    Args:
        shape: Shape of one example's features: (D,); (T, D) tokens; (D, T), (D, H, W) or (D, Z, H, W) with
            channels="first"; (H, W, D) or (Z, H, W, D) with channels="last".
        grid: Number of cells per dimension over which features are averaged; smaller features have one cell per
            position.
        channels: "first" or "last"; None: "last" for two dimensions, "first" for more.

    Raises ValueError for features of another number of dimensions.
    """

    def __init__(self, shape: tuple[int, ...], grid: int = 1, channels: str | None = None):
        dimensions = len(shape) - 1
        channels = channels or ("last" if dimensions == 1 else "first")
        if not 0 <= dimensions <= 3:
            raise ValueError(
                f"shape must have 1 to 4 dimensions, such as (D,), (T, D) or (D, H, W), not {tuple(shape)}"
            )
        self.dim, self.is_last = shape[0], False
        if dimensions == 0:
            super().__init__()
        elif dimensions == 1 and channels == "last":
            super().__init__(nn.LayerNorm(shape[1]), Mean(1))
            self.dim = shape[1]
        else:
            width, *sizes = shape if channels == "first" else (shape[-1], *shape[:-1])
            cells = [min(grid, size) for size in sizes]
            average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
            super().__init__(average(tuple(cells)), nn.Flatten())
            self.dim, self.is_last = width * math.prod(cells), channels == "last"

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, dim). `mask` (B, T) is not 0 at the tokens that count; None: all do.

        Raises ValueError for a mask of other tokens, or of features that are no tokens; vectors (B, D) need none.
        """
        if mask is None or len(self) == 0:
            return super().forward(features.movedim(-1, 1) if self.is_last else features)
        if not isinstance(self[-1], Mean) or mask.shape != features.shape[:2]:
            raise ValueError(
                f"mask must be (B, T) for tokens (B, T, D), not {tuple(mask.shape)} for features"
                f" {tuple(features.shape)}; cut with mask='' or heads of your own"
            )
        weights = mask.to(features.dtype).unsqueeze(-1)
        return (self[0](features) * weights).sum(1) / weights.sum(1).clamp(min=1)


class Mean(nn.Module):
    """Average over one dimension."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.dim)


@dataclass(frozen=True)
class HeadOptions:
    """How the heads of a network are made. Raises ValueError for a value that is not allowed.

    Args:
        depth, hidden_dim: Number and size of the hidden layers; depth 0 makes the head linear.
        grid: Features of images, series and volumes are pooled to `grid` cells per dimension.
        norm: Normalize hidden layers before their ReLU: batch-norm, and layer-norm for a head per position.
        prior_input: Whether the head reads the preceding belief. It is part of the loss in either case.
        prior_dropout: Share of the examples for which the head reads the uniform belief instead, in training.
    """

    depth: int = 1
    hidden_dim: int = 256
    grid: int = 4
    norm: bool = False
    prior_input: bool = True
    prior_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("hidden_dim", 1), ("grid", 1)):
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < least:
                name, value = {"depth": "head_depth"}.get(name, name), getattr(self, name)
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value}")
        if not 0 <= self.prior_dropout <= 1:
            raise ValueError(f"prior_dropout must be in [0, 1], not {self.prior_dropout}")


class StageHead(nn.Module):
    """An MLP on concat(belief, pooling(features)) that returns the logits of one stage.

    Args:
        feature_dim, num_classes: Sizes D of the pooled features (B, D) and C of belief and logits (B, C).
        hidden_dim, depth: Size and number of the hidden layers with ReLU: 1 in the public implementation; 0 is linear.
        pooling: Maps features (B, ...) to (B, D); None is the identity.
        norm, prior_input, prior_dropout: As in `HeadOptions`.
    """

    norm_type: Callable[[int], nn.Module] = nn.BatchNorm1d

    def __init__(
        self, feature_dim: int, num_classes: int, hidden_dim: int = 256, *, depth: int = 1,
        pooling: nn.Module | None = None, norm: bool = False, prior_input: bool = True, prior_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.pooling = nn.Identity() if pooling is None else pooling
        self.prior_input, self.prior_dropout = prior_input, prior_dropout
        input_dim = feature_dim + (num_classes if prior_input else 0)
        self.hidden: nn.Module = nn.Linear(input_dim, hidden_dim) if depth else nn.Identity()
        self.relu: nn.Module = nn.ReLU(inplace=True) if depth else nn.Identity()
        self.deeper = nn.Sequential()
        for _ in range(depth - 1):
            self.deeper.extend([nn.Linear(hidden_dim, hidden_dim), nn.ReLU(inplace=True)])
        self.logits = nn.Linear(hidden_dim if depth else input_dim, num_classes)
        if norm and depth:
            norms = [type(self).norm_type(hidden_dim) for _ in range(depth)]
            self.relu = nn.Sequential(norms[0], self.relu)
            for i, layer in enumerate(norms[1:]):
                self.deeper.insert(3 * i + 1, layer)

    def forward(self, features: Tensor, prior: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, C) for features (B, ...), the prior belief (B, C) and the mask of the pooling."""
        inputs = self.pooling(features) if mask is None else self.pooling(features, mask)
        if self.prior_input:
            if self.training and self.prior_dropout:
                dropped = torch.rand(len(prior), device=prior.device) < self.prior_dropout
                prior = prior.masked_fill(dropped.view(-1, *[1] * (prior.dim() - 1)), 1 / prior.shape[-1])
            inputs = torch.cat((prior, inputs), dim=-1)
        return self.logits(self.deeper(self.relu(self.hidden(inputs.to(self.logits.weight.dtype)))))


class PositionHead(StageHead):
    """A `StageHead` applied to every token, pixel or voxel.

    If features have a lower resolution than the belief, the head reads the belief's mean over their cells, and its
    logits are interpolated.

    Args:
        shape: Shape of one example's features, as for `FeaturePooling`.
        channels: "first" or "last".
        options: More arguments of `StageHead`, except `pooling`.
    """

    norm_type = nn.LayerNorm

    def __init__(self, shape: tuple[int, ...], channels: str, **options: Any):
        width = shape[0] if channels == "first" else shape[-1]
        super().__init__(width, pooling=nn.LayerNorm(width), **options)
        self.channels = channels

    def forward(self, features: Tensor, prior: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, ..., C) for features (B, ...) and the prior belief (B, ..., C)."""
        features = features.movedim(1, -1) if self.channels == "first" else features
        sizes, feature_sizes = prior.shape[1:-1], features.shape[1:-1]
        if sizes == feature_sizes:
            return super().forward(features, prior)
        belief = F.interpolate(prior.movedim(-1, 1), feature_sizes, mode="area").movedim(1, -1)
        logits = super().forward(features, belief).movedim(-1, 1)
        return F.interpolate(logits, sizes, mode=("linear", "bilinear", "trilinear")[len(sizes) - 1]).movedim(1, -1)


class LinearClassifier(nn.Module):
    """The linear classifier of an ordinary network, called like a stage's head; it ignores the prior."""

    def __init__(self, feature_dim: int, num_classes: int, pooling: nn.Module):
        super().__init__()
        self.pooling = pooling
        self.logits = nn.Linear(feature_dim, num_classes)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """Return the logits (B, C) for features (B, ...); `prior` (B, C) is not used."""
        return self.logits(self.pooling(features))


class StackedHeads(nn.Module):
    """The stages of the shared layout as one module: L equal heads with one hidden layer, stacked in four parameters.

    Stage i computes what the i-th of L modules `Stage(StageHead(...))` computes; its parameters are drawn in the same
    way. `sid_step` trains all stages at once with `sid_kernels.refine_cascade`, and one optimizer owns them all.
    Iterating gives the stages as functions (features, prior) -> (features, logits). The module itself is not called, so
    hooks on it do not run. `load_state_dict` also accepts the state of L modules `Stage(StageHead(...))`.

    Args:
        depth: Number of stages L.
        feature_dim, num_classes, hidden_dim: Sizes D of the features, C of the logits and H of the hidden layers.
    """

    SOURCES = {name: name.replace("_", ".") for name in CascadeWeights._fields}  # parameter -> its name in a StageHead

    def __init__(self, depth: int, feature_dim: int, num_classes: int, hidden_dim: int = 256):
        super().__init__()
        heads = [StageHead(feature_dim, num_classes, hidden_dim).state_dict() for _ in range(depth)]
        self.hidden_weight, self.hidden_bias, self.logits_weight, self.logits_bias = (
            nn.Parameter(torch.stack([head[source] for head in heads])) for source in self.SOURCES.values()
        )  # (L, H, C + D), (L, H), (L, C, H), (L, C)

    @property
    def weights(self) -> CascadeWeights:
        """The four parameters, as `sid_kernels.refine_cascade` takes them."""
        return CascadeWeights(self.hidden_weight, self.hidden_bias, self.logits_weight, self.logits_bias)

    def __len__(self) -> int:
        return len(self.hidden_weight)

    def __iter__(self) -> Iterator[StageCall]:
        """Yield the stages, first to last. Autograd reaches the stacked parameters in one step for all stages."""
        for weights in zip(*(weight.unbind() for weight in self.weights), strict=True):
            yield partial(run_head, CascadeWeights(*weights))

    def local_stages(self) -> list[StageCall]:
        """Return the stages on leaf tensors of their own, for one backward per stage.

        A stage's backward adds to its own entries of the stacked gradients and touches no other stage's.
        """
        leaves = []
        for weight in self.weights:
            parts = weight.detach().unbind()
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                for part, gradient in zip(parts, weight.grad.unbind(), strict=True):
                    part.requires_grad_().grad = gradient
            leaves.append(parts)
        return [partial(run_head, CascadeWeights(*weights)) for weights in zip(*leaves, strict=True)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, source in self.SOURCES.items():
            keys = [f"{prefix}{i}.head.{source}" for i in range(len(self))]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *args)


def run_head(weights: CascadeWeights, features: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) as they are and the logits (B, C) of one head with these weights."""
    inputs = torch.cat((prior, features), dim=1)
    hidden = F.relu(F.linear(inputs, weights.hidden_weight, weights.hidden_bias), inplace=True)
    return features, F.linear(hidden, weights.logits_weight, weights.logits_bias)
