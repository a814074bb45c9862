"""Heads: the modules that turn features and the preceding belief into one stage's logits."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_kernels import CascadeWeights

StageCall = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # features, prior -> this stage's features, logits


class FeaturePooling(nn.Sequential):
    """Pool features of one shape to vectors (B, `dim`): average images over a grid, normalise and average tokens.

    Args:
        shape: Shape of one example's features: (D,), (T, D) or (D, H, W).
        grid: Images are averaged within each cell of a grid x grid raster. A smaller image has one cell per pixel.

    Raises ValueError for features of another number of dimensions.
    """

    def __init__(self, shape: tuple[int, ...], grid: int = 1):
        if len(shape) == 1:
            super().__init__()
            self.dim = shape[0]
        elif len(shape) == 2:
            super().__init__(nn.LayerNorm(shape[1]), Mean(1))
            self.dim = shape[1]
        elif len(shape) == 3:
            cells = min(grid, shape[1]), min(grid, shape[2])
            super().__init__(nn.AdaptiveAvgPool2d(cells), nn.Flatten())
            self.dim = shape[0] * cells[0] * cells[1]
        else:
            raise ValueError(f"shape must be (D,), (T, D) or (D, H, W), not {tuple(shape)}")


class Mean(nn.Module):
    """The mean over one dimension."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.dim)


class StageHead(nn.Module):
    """An MLP on concat(belief, pooling(features)) that returns the logits of one stage.

    It has `depth` hidden layers of `hidden_dim` units with ReLU. Depth 1 is the head of the method's public
    implementation; depth 0 is linear.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 256,
        *,
        depth: int = 1,
        pooling: nn.Module | None = None,
    ):
        super().__init__()
        self.pooling = nn.Identity() if pooling is None else pooling
        input_dim = num_classes + feature_dim
        self.hidden = nn.Linear(input_dim, hidden_dim) if depth else nn.Identity()
        self.relu = nn.ReLU(inplace=True) if depth else nn.Identity()
        self.deeper = nn.Sequential()
        for _ in range(depth - 1):
            self.deeper.extend([nn.Linear(hidden_dim, hidden_dim), nn.ReLU(inplace=True)])
        self.logits = nn.Linear(hidden_dim if depth else input_dim, num_classes)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """Return the logits (B, C) for features (B, ...) and the prior belief (B, C)."""
        inputs = torch.cat((prior, self.pooling(features)), dim=1)
        return self.logits(self.deeper(self.relu(self.hidden(inputs))))


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

    Stage i computes what the i-th of L modules `Stage(StageHead(...))` computes, and the parameters are drawn as theirs
    are. `sid_step` trains all stages at once with `sid_kernels.refine_cascade`, and one optimizer owns all of them.
    Iterating gives the stages as functions (features, prior) -> (features, logits). No step calls the module itself, so
    module hooks on it do not run.

    `load_state_dict` also accepts the state of L modules `Stage(StageHead(...))`.

    Args:
        depth: Number of stages L.
        feature_dim: Size of the features D.
        num_classes: Number of classes C.
        hidden_dim: Size of the hidden layers H.
    """

    SOURCES = {
        "hidden_weight": "hidden.weight",
        "hidden_bias": "hidden.bias",
        "logits_weight": "logits.weight",
        "logits_bias": "logits.bias",
    }  # parameter -> its name in a StageHead

    def __init__(self, depth: int, feature_dim: int, num_classes: int, hidden_dim: int = 256):
        super().__init__()
        heads = [StageHead(feature_dim, num_classes, hidden_dim) for _ in range(depth)]
        stacked = [torch.stack([head.get_parameter(source).detach() for head in heads])
                   for source in self.SOURCES.values()]  # fmt: skip
        self.hidden_weight = nn.Parameter(stacked[0])  # (L, H, C + D)
        self.hidden_bias = nn.Parameter(stacked[1])  # (L, H)
        self.logits_weight = nn.Parameter(stacked[2])  # (L, C, H)
        self.logits_bias = nn.Parameter(stacked[3])  # (L, C)

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

    def local_stages(self) -> Iterator[StageCall]:
        """Yield the stages on leaf tensors of their own, for one backward per stage.

        A stage's backward adds to its own entries of the stacked gradients and touches no other stage's.
        """
        for weight in self.weights:
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        parts = [weight.detach().unbind() for weight in self.weights]
        gradients = [[None] * len(self) if w.grad is None else w.grad.unbind() for w in self.weights]
        for i in range(len(self)):
            leaves = CascadeWeights(*(part[i] for part in parts))
            for leaf, gradient, weight in zip(leaves, gradients, self.weights, strict=True):
                leaf.requires_grad_(weight.requires_grad).grad = gradient[i]
            yield partial(run_head, leaves)

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
