"""Heads: the modules that turn features and the preceding belief into one stage's logits."""

import torch
from torch import Tensor, nn


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
