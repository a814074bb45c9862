"""`BeliefHead`: the last layer of a SID stage as a module, over `fused_belief_head`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .fused_belief_head import fused_belief_head
from .head_problem import PriorHead
from .problem import LocalLoss


class BeliefHead(nn.Linear):
    """Linear layer from hidden (..., H) to the logits of C classes, and the local loss of the belief they give.

    Parameters, their initial values and state dict are `nn.Linear(hidden_dim, num_classes)`'s. Called, it returns the
    local loss without ever holding all logits; `logits` is the plain layer, for inference.
    """

    def __init__(self, hidden_dim: int, num_classes: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__(hidden_dim, num_classes, bias, device=device, dtype=dtype)

    def forward(
        self, hidden: Tensor, prior: Tensor | PriorHead | None, target: Tensor, alpha: float | Tensor = 0.5, **options
    ) -> LocalLoss:
        """hidden (..., H), prior (..., C), None or `another_head.as_prior(its_hidden)`, target (...) or (..., C).

        `options` and errors: those of `fused_belief_head`.
        """
        return fused_belief_head(hidden, self.weight, self.bias, prior, target, alpha, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., H) -> (..., C)."""
        return F.linear(hidden, self.weight, self.bias)

    def as_prior(self, hidden: Tensor) -> PriorHead:
        """The belief of this head over hidden (..., H), as a prior that is never stored. No gradient comes back."""
        bias = None if self.bias is None else self.bias.detach()
        return PriorHead(hidden.detach(), self.weight.detach(), bias)
