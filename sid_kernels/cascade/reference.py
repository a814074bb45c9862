"""The cascade stage by stage: two products and one fused local loss each, on any device, in any dtype.

It is the definition of `refine_cascade` (with the reference loss, also in float64), and what runs where no kernel takes
the whole cascade.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..local_loss.dispatch import run as run_local_loss
from ..local_loss.problem import Problem, scale_of_mean
from .problem import CascadePass, CascadeProblem


def run(problem: CascadeProblem, backend: str) -> CascadePass:
    """`backend` is the local loss's."""
    features, weights = problem.features, problem.weights
    stages, _, classes = weights.sizes
    compute = torch.float64 if features.dtype is torch.float64 else torch.float32
    prior, scale = problem.prior, None
    if problem.reduction == "mean":
        scale = scale_of_mean(problem.labels, problem.ignore_index, features)
    if prior is None:
        prior = features.new_full((features.shape[0], classes), 1.0 / classes)
    prior = prior.to(compute)  # between stages it is not rounded, as it is not in a kernel that keeps it on chip
    losses, beliefs, hiddens, slopes, dhiddens = [], [], [], [], []
    for i in range(stages):
        inputs = torch.cat((prior.to(features.dtype), features), 1)  # (B, C + D)
        hidden = F.linear(inputs, weights.hidden_weight[i], weights.hidden_bias[i]).relu_()  # (B, H)
        logits = F.linear(hidden, weights.logits_weight[i], weights.logits_bias[i])  # (B, C)
        loss = Problem(
            logits, prior, problem.labels, problem.soft,
            problem.alpha if isinstance(problem.alpha, float) else problem.alpha[i],
            problem.reverse, problem.label_smoothing, problem.ignore_index, "none", None, problem.need_grad,
        )  # fmt: skip
        result = run_local_loss(loss, backend)
        losses.append(torch.stack((result.loss, result.fidelity, result.consistency)))
        prior = result.belief
        beliefs.append(prior.to(features.dtype))
        if problem.need_grad:
            dlogits = result.dlogits.mul_(scale) if scale is not None else result.dlogits
            dhiddens.append(torch.where(hidden <= 0, 0, dlogits @ weights.logits_weight[i]))
            hiddens.append(hidden)
            slopes.append(dlogits)
    losses = torch.stack(losses, 1).sum(-1)  # (3, L)
    losses = losses if scale is None else losses * scale
    gradients = [torch.stack(x) if problem.need_grad else None for x in (slopes, hiddens, dhiddens)]
    return CascadePass(losses, torch.stack(beliefs), logits, *gradients, carry=prior)
