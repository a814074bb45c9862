"""The network SID trains: an extractor, then a cascade of stages that each turn the preceding belief into a better one.

Nothing here knows how the network is trained; that is `step.py`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class BeliefHead(nn.Module):
    """Logits of one stage from the preceding belief and the features: Linear - ReLU - Linear on concat(belief, f)."""

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 256):
        super().__init__()
        self.hidden = nn.Linear(num_classes + feature_dim, hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.logits = nn.Linear(hidden_dim, num_classes)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """features (B, D), prior (B, C) -> logits (B, C)."""
        return self.logits(self.relu(self.hidden(torch.cat((prior, features), dim=1))))


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


class SIDNetwork(nn.Module):
    """An extractor and L stages, in this order also in `parameters()`.

    `forward` is plain inference and returns the *logits* of the last stage, like any PyTorch classifier: their argmax
    is the answer and their softmax the final belief. Gradients, where enabled, flow through the whole chain of
    softmaxes (that is what `bp_step` trains); SID itself never calls `forward`.
    """

    def __init__(self, extractor: nn.Module, stages: Iterable[Stage], num_classes: int):
        super().__init__()
        self.extractor = extractor
        self.stages = nn.ModuleList(stages)
        self.num_classes = num_classes

    def uniform(self, features: Tensor) -> Tensor:
        """p_0, the belief the first stage reads: (B, C), every entry 1/C."""
        return features.new_full((features.shape[0], self.num_classes), 1 / self.num_classes)

    def stage_logits(self, inputs: Tensor) -> list[Tensor]:
        """The logits (B, C) of every stage, first to last; the priors are the softmaxes of the ones before."""
        features = at_least_float32(self.extractor(inputs))
        prior, every = self.uniform(features), []
        for stage in self.stages:
            features, logits = stage(features, prior)
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
