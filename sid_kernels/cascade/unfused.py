"""A cascade stage by stage in differentiable operators, for torch.func transforms and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.autograd import is_compiling
from ..local_loss import torch_op
from ..local_loss.problem import LocalLoss
from ..local_loss.sharded import is_sharded
from .problem import CascadeResult, CascadeWeights, cascade_options


def stage_by_stage(
    features: Tensor, weights: CascadeWeights, target: Tensor, alpha: float | Sequence[float] | Tensor,
    prior: Tensor | None, options: tuple, backend: str,
) -> CascadeResult:  # fmt: skip
    """Return the result of one local loss per stage; options: the arguments of `LossOptions`."""
    cascade_options(*options)
    stages, _, classes = weights.sizes
    belief = features.new_full((features.shape[0], classes), 1.0 / classes) if prior is None else prior.detach()
    results = []
    for i in range(stages):
        hidden_weight, hidden_bias, logits_weight, logits_bias = (x[i] for x in weights)
        inputs = torch.cat((belief.to(features.dtype), features), 1)
        logits = F.linear(F.linear(inputs, hidden_weight, hidden_bias).relu(), logits_weight, logits_bias)
        own = alpha[i] if isinstance(alpha, Sequence) or (isinstance(alpha, Tensor) and alpha.dim()) else alpha
        results.append(LocalLoss(*torch_op.call(logits, belief, target, own, options, backend)[:4]))
        last = results[-1].belief
        assert last is not None
        belief = last.detach()
    loss, fidelity, consistency = (
        torch.stack([getattr(x, name) for x in results]) for name in ("loss", "fidelity", "consistency")
    )
    return CascadeResult(loss.sum(), belief.to(features.dtype), fidelity, consistency, loss.detach(), logits.detach())


def refuse_sharded(*values: Tensor | None) -> None:
    """Raise TypeError for DTensors, which a cascade does not take."""
    if not is_compiling() and is_sharded(*values):
        raise TypeError(
            "refine_cascade takes no DTensor; pass local tensors (to_local()), or call the stages one by one"
        )
