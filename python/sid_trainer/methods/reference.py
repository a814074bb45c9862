"""The SID step of the public implementation, for comparison: one backward over the sum of all losses."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import fused_local_loss
from sid_kernels.core.checks import canonical_target

from ..network.heads import StageCall
from ..network.local_pass import collect_terms, take_terms
from ..network.modules import SIDNetwork, at_least_float32
from .common import StepOptions, StepResult, autocast, check_owned, teacher_beliefs
from .updates import Optimizers, clear_gradients, update


def reference_step(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = ()
) -> StepResult:
    """Train all stages with one backward over their summed losses, which holds the graphs of all stages.

    The losses are plain PyTorch, except for the options that the public implementation does not have.
    """
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    teachers = teacher_beliefs(network, inputs, options.dtype)
    stage_logits, terms_by_stage = [], []
    with collect_terms() as terms, autocast(inputs, options.dtype):
        features = at_least_float32(network.extractor(inputs))
        priors = [network.uniform(features), *teachers[:-1]]
        stages: Iterable[StageCall] = network.stages
        for stage, prior in zip(stages, priors, strict=True):
            outputs, logits = stage(features, prior)
            features = outputs if outputs is features else outputs.detach()
            stage_logits.append(logits)
            terms_by_stage.append(take_terms(terms))
    plain = options.divergence == "forward" and not options.label_smoothing
    labels, soft = canonical_target(targets, stage_logits[0], stage_logits[0].shape)  # checks shapes
    if labels is not None and labels.is_cpu:
        plain &= bool(((labels >= 0) & (labels < network.num_classes)).all())  # otherwise rows are ignored, or an error
    rows = F.one_hot(labels, network.num_classes) if plain and labels is not None else soft  # (B, C)
    losses = []
    alphas = options.stage_alphas(len(priors))
    for i, (logits, prior, alpha) in enumerate(zip(stage_logits, priors, alphas, strict=True)):
        if plain and rows is not None:
            log_belief = F.log_softmax(at_least_float32(logits), dim=1)
            fidelity = F.kl_div(log_belief, rows.to(log_belief.dtype), reduction="batchmean")
            consistency = F.kl_div(log_belief, prior, reduction="batchmean")
            losses.append(alpha * fidelity + (1 - alpha) * consistency)
        else:
            losses.append(fused_local_loss(logits, prior, targets, alpha, **options.loss_of_stage(i)).loss)
    stage_loss = torch.stack([sum(terms, loss) for loss, terms in zip(losses, terms_by_stage, strict=True)])
    if stage_loss.requires_grad:
        stage_loss.sum().backward()
    update(optimizers)
    return StepResult(stage_loss.detach(), stage_logits[-1].detach())
