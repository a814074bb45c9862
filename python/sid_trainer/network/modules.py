"""The network SID trains: an extractor, then a cascade of stages that each turn the preceding belief into a better one.

Nothing here knows how the network is trained; that is `step.py` and `methods.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Reader(nn.Sequential):
    """Features of one shape -> vectors (B, D): images are pooled to a grid, tokens normalised and averaged.

    Args:
        shape: of one example's features: (D,), (T, D) or (D, H, W).
        grid: images are averaged within each cell of a grid x grid raster (fewer cells where they are smaller).
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
            raise ValueError(f"features must be (D,), (T, D) or (D, H, W) an example, not {tuple(shape)}")


class Mean(nn.Module):
    """The mean over one dimension."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.dim)


class StageHead(nn.Module):
    """Logits of one stage from the preceding belief and what the reader sees of the features.

    An MLP on concat(belief, reader(f)): `depth` hidden layers of `hidden_dim` with ReLU, then the logits. Depth 1 is
    the public reference's head; depth 0 is linear.
    """

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 256, *, depth: int = 1,
                 reader: nn.Module | None = None):  # fmt: skip
        super().__init__()
        self.reader = nn.Identity() if reader is None else reader
        width = hidden_dim if depth else num_classes + feature_dim
        self.hidden = nn.Linear(num_classes + feature_dim, hidden_dim) if depth else nn.Identity()
        self.relu = nn.ReLU(inplace=True) if depth else nn.Identity()
        deeper = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU(inplace=True))]
        self.deeper = nn.Sequential(*deeper)
        self.logits = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """features (B, ...), prior (B, C) -> logits (B, C)."""
        seen = torch.cat((prior, self.reader(features)), dim=1)
        return self.logits(self.deeper(self.relu(self.hidden(seen))))


class PlainHead(nn.Module):
    """The linear classifier of an ordinary network: a stage's head that does not look at the prior."""

    def __init__(self, feature_dim: int, num_classes: int, reader: nn.Module):
        super().__init__()
        self.reader = reader
        self.logits = nn.Linear(feature_dim, num_classes)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """features (B, ...), prior (B, C), unused -> logits (B, C)."""
        return self.logits(self.reader(features))


class Stage(nn.Module):
    """One local learner: a body, which makes the features it reads (shared layout: the identity), and a belief head."""

    def __init__(self, head: nn.Module, body: nn.Module | None = None):
        super().__init__()
        self.body = nn.Identity() if body is None else body
        self.head = head

    def forward(self, features: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """features of the preceding stage, prior (B, C) -> this stage's features, logits (B, C)."""
        features = self.body(features)
        return features, self.head(features, prior)


def directly(module: nn.Module, *inputs: Tensor) -> Any:
    return module(*inputs)


class SIDNetwork(nn.Module):
    """An extractor and L stages, in this order also in `parameters()`.

    `forward` is plain inference and returns the *logits* of the last stage, like any PyTorch classifier: their argmax
    is the answer and their softmax the final belief. Gradients, where enabled, flow through the whole chain of
    softmaxes (that is what backpropagation trains); SID itself never calls `forward`.
    """

    def __init__(self, extractor: nn.Module, stages: Iterable[nn.Module], num_classes: int):
        super().__init__()
        self.extractor = extractor
        self.stages = nn.ModuleList(stages)
        self.num_classes = num_classes

    def uniform(self, features: Tensor) -> Tensor:
        """p_0, the belief the first stage reads: (B, C), every entry 1/C."""
        return features.new_full((features.shape[0], self.num_classes), 1 / self.num_classes)

    def stage_logits(self, inputs: Tensor, call: Callable[..., Any] = directly) -> list[Tensor]:
        """The logits (B, C) of every stage, first to last; the priors are the softmaxes of the ones before.

        `call(module, *inputs)` calls each block of the extractor and each stage: activation checkpointing goes there.
        """
        features = inputs
        for block in self.extractor if isinstance(self.extractor, nn.Sequential) else [self.extractor]:
            features = call(block, features)
        features = at_least_float32(features)
        prior, every = self.uniform(features), []
        for stage in self.stages:
            features, logits = call(stage, features, prior)
            prior = at_least_float32(logits).softmax(dim=1)
            every.append(logits)
        return every

    def beliefs(self, inputs: Tensor) -> Tensor:
        """The belief of every stage, (L, B, C)."""
        return at_least_float32(torch.stack(self.stage_logits(inputs))).softmax(dim=2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage_logits(inputs)[-1]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Beliefs, and the features the stages share, stay in float32 under autocast: their sums run over all stages."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
