"""Fused local losses for Synergistic Information Distillation (arXiv 2510.03273).

from sid_kernels import fused_local_loss
loss, belief, fidelity, consistency = fused_local_loss(logits, prior, target, alpha=0.5)
loss.backward()
"""

from importlib.metadata import PackageNotFoundError, version

import torch  # noqa: F401  # before the compiled modules, so that they share its OpenMP runtime

# The module and the function share a name, and the name means the function. A later
# `import sid_kernels.fused_local_loss` finds the module loaded and does not change the attribute.
from .core.memory import release_memory
from .fused_belief_head import BeliefHead, PriorHead, belief_head_and_grad, fused_belief_head
from .fused_local_loss import LocalLoss, fused_local_loss, local_loss_and_grad
from .refine_cascade import CascadeResult, CascadeWeights, refine_cascade, refine_cascade_and_grad

try:
    __version__ = version("sid_kernels")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "BeliefHead",
    "CascadeResult",
    "CascadeWeights",
    "LocalLoss",
    "PriorHead",
    "belief_head_and_grad",
    "fused_belief_head",
    "fused_local_loss",
    "local_loss_and_grad",
    "refine_cascade",
    "refine_cascade_and_grad",
    "release_memory",
]
