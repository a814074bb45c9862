"""Measure every stage on a split: accuracy, KL divergence to the labels, and the descent certificate."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import fused_local_loss

from ..methods.common import StepOptions, autocast
from ..methods.readouts import in_parts
from ..network.modules import SIDNetwork, at_least_float32, certainty
from ..network.own import Network

# Relative to 1 + loss. A stage that copies its prior repeats its loss to 1.4e-6, measured on 2,000 images with C up to
# 1,000 and both divergences.
ROUNDING = 2e-6


@torch.no_grad()
def evaluate(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], options: StepOptions
) -> dict[str, list[float]]:
    """Return the means of three metrics over all images, one number per stage.

    `accuracy` is that of belief p_i. `kl` is KL(y || p_i) = -log p_i[y], in nats. `certificate` is the share of images
    for which stage i has at most the SID loss of a copy of its prior q: L_i(p_i) <= L_i(q), up to rounding. For these,
    KL(y || p_i) <= KL(y || q) - (1 - alpha) / alpha * KL(q || p_i), so depth can only help (arXiv 2510.03273).

    The network stays in evaluation mode. Raises ValueError with the stage's number if a metric is infinite or NaN.

    Args:
        batches: Pairs of inputs (B, ...) and labels (B,).
        options: The loss that the stages were trained with, and the dtype of the forward pass.
    """
    network.eval()
    batches = in_parts(network, batches)
    sums, count = sum_metrics(batches, lambda inputs: stage_logits(network, inputs, options.dtype), options)
    if (stage := first_non_finite_stage(sums)) is not None:
        raise ValueError(f"the logits of stage {stage + 1} are not finite")
    return means(sums, count)


@torch.no_grad()
def accuracy(
    classify: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], options: StepOptions
) -> float:
    """Return the accuracy of `classify`, which maps inputs (B, ...) to logits (B, C)."""
    correct = count = 0
    for inputs, targets in batches:
        with autocast(inputs, options.dtype):
            correct += int((classify(inputs).argmax(dim=1) == targets).sum())
        count += len(targets)
    return correct / count


@torch.no_grad()
def exit_curve(
    network: SIDNetwork, batches: Iterable[tuple[Tensor, Tensor]], options: StepOptions, confidences: Sequence[float]
) -> list[tuple[float, list[float]]]:
    """Return the accuracy of `network.predict` for each confidence, and the share of images that leave at each stage.

    The cascade runs once for all confidences.
    """
    confidence = torch.tensor(confidences)[:, None, None]
    correct = torch.zeros(len(confidences), dtype=torch.float64)
    counts = torch.zeros(len(confidences), network.depth)
    for inputs, targets in batches:
        with autocast(inputs, options.dtype):
            beliefs = network.beliefs(inputs)  # (L, B, C)
        sure = certainty(beliefs).cpu() >= confidence  # (confidences, L, B)
        sure[:, -1] = True
        exits = sure.int().argmax(dim=1)  # the first stage that is sure
        correct += (beliefs.argmax(dim=2).cpu().gather(0, exits) == targets.cpu()).sum(dim=1)
        counts += F.one_hot(exits, network.depth).sum(dim=1)
    images = counts.sum(dim=1)
    return list(zip((correct / images).tolist(), (counts / images[:, None]).tolist(), strict=True))


def stage_logits(network: Network, inputs: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the logits (B, C) of every stage and the prior (B, C) of the first stage."""
    with autocast(inputs, dtype):
        logits = network.stage_logits(inputs)
    return logits, network.uniform(at_least_float32(logits[0]))


def sum_metrics(
    batches: Iterable[tuple[Any, Tensor]], run_stages: Callable[[Any], tuple[Sequence[Tensor], Tensor]],
    options: StepOptions,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return the sums (3, L), float64, of the metrics of `evaluate`, and the number of images.

    `run_stages` maps the inputs of a batch to the logits of L stages and the first prior, as in `stage_logits`.
    """
    sums, count = torch.zeros(()), 0
    for inputs, targets in batches:
        batch = stage_metrics(*run_stages(inputs), targets, options)
        sums, count = sums.to(batch) + batch, count + len(targets)
    return sums.cpu(), count


def first_non_finite_stage(sums: Tensor) -> int | None:
    """Return the first stage, from 0, whose column of `sums` (3, L) has an infinite or NaN entry, or None."""
    bad = (~sums.isfinite()).any(0).nonzero()
    return int(bad[0]) if len(bad) else None


def means(sums: Tensor, count: int) -> dict[str, list[float]]:
    """Return the metrics of `evaluate` from their sums (3, L)."""
    return dict(zip(("accuracy", "kl", "certificate"), (sums / count).tolist(), strict=True))


def stage_metrics(logits: Sequence[Tensor], prior: Tensor, targets: Tensor, options: StepOptions) -> Tensor:
    """Return the sums (3, L), float64, of the metrics of `evaluate` over one batch.

    Args:
        logits: (B, C) for each of the L stages.
        prior: (B, C), the prior of the first stage.
    """
    columns = []
    alphas = options.stage_alphas(len(logits))
    for i, (z, alpha) in enumerate(zip(map(at_least_float32, logits), alphas, strict=True)):
        terms = options.loss_of_stage(i)
        loss = fused_local_loss(z, prior, targets, alpha, reduction="none", **terms).loss
        copy = prior.clamp_min(torch.finfo(prior.dtype).tiny).log()
        copy_loss = fused_local_loss(copy, prior, targets, alpha, reduction="none", **terms).loss
        kl = F.cross_entropy(z, targets, reduction="none")
        correct = z.argmax(dim=1) == targets
        certified = loss <= copy_loss + ROUNDING * (1 + copy_loss)
        columns.append(torch.stack([metric.double().sum() for metric in (correct, kl, certified)]))
        prior = z.softmax(dim=1)  # the prior of the next stage
    return torch.stack(columns, dim=1)
