"""The cascade stage by stage: two products and one fused local loss each, on any device, in any dtype.

It is the definition of `refine_cascade` (with the reference loss, also in float64), and runs if no kernel takes the
whole cascade.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ..core.options import LIFT
from ..local_loss.dispatch import run as run_local_loss
from ..local_loss.problem import LocalLossProblem, scale_of_mean
from .problem import CascadeActivations, CascadeOutputs, CascadeProblem


def run(problem: CascadeProblem, backend: str) -> CascadeOutputs:
    """Return the outputs of a cascade, with local losses computed by `backend`."""
    features, weights, spec = problem.features, problem.weights, problem.spec
    stages, _, classes = weights.sizes
    prior, scale = problem.prior, None
    if spec.options.reduction == "mean":
        scale = scale_of_mean(spec, features)
    if prior is None:
        prior = features.new_full((features.shape[0], classes), 1.0 / classes)
    belief = prior.to(problem.compute_dtype)  # not rounded between stages, as in a kernel that keeps it on chip
    # float16: lifted out of the range of subnormal numbers. Its reduction is "sum": see `dispatch.run`.
    lift = LIFT if features.dtype is torch.float16 else 1.0
    incoming = None if lift == 1.0 else torch.full((), lift, device=features.device)
    row_options = dataclasses.replace(spec.options, reduction="none")
    losses, beliefs, by_stage = [], [], []
    for i in range(stages):
        inputs = torch.cat((belief.to(features.dtype), features), 1)  # (B, C + D)
        hidden = F.linear(inputs, weights.hidden_weight[i], weights.hidden_bias[i]).relu_()  # (B, H)
        logits = F.linear(hidden, weights.logits_weight[i], weights.logits_bias[i])  # (B, C)
        alpha = spec.alpha if isinstance(spec.alpha, float) else spec.alpha[i]
        stage = spec._replace(alpha=alpha, options=row_options)
        loss = LocalLossProblem(logits, belief, stage, problem.need_grad, incoming=incoming)
        outputs = run_local_loss(loss, backend)
        losses.append(torch.stack((outputs.loss, outputs.fidelity, outputs.consistency)))
        assert outputs.belief is not None
        belief = outputs.belief
        beliefs.append(belief.to(features.dtype))
        if (dlogits := outputs.dlogits) is not None:
            dlogits = dlogits if scale is None else dlogits.mul_(scale)
            dhidden = torch.where(hidden <= 0, 0, dlogits @ weights.logits_weight[i])
            by_stage.append((dlogits, hidden, dhidden))
    total = torch.stack(losses, 1).sum(-1)  # (3, L)
    total = total if scale is None else total * scale
    stacked = [torch.stack(x) for x in zip(*by_stage, strict=True)]
    activations = CascadeActivations(*stacked) if problem.need_grad else None
    return CascadeOutputs(total, torch.stack(beliefs), logits, activations, last_belief=belief, lift=lift)
