"""What every stage knows of a split: accuracy, distance to the truth, and how often the descent certificate holds."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import fused_local_loss

from ..methods.common import autocast
from ..network.modules import SIDNetwork, at_least_float32

# A stage that copies its prior repeats its loss to 1.4e-6 of 1 + loss (2000 images, C up to 1000, both divergences).
ROUNDING = 2e-6


def evaluate(
    network: SIDNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    alphas: Sequence[float],
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[float]]:
    """Means over the images of batches (inputs (B, ...), labels (B,)), one number a stage; the network is put into
    evaluation mode.

    `accuracy` of belief p_i; `kl`, KL(y || p_i) = -log p_i[y] in nats; `certificate`, the share of images for which
    stage i is no worse by SID's loss with `alphas` than copying prior q, L_i(p_i) <= L_i(q) (rounding aside). Where
    it holds, so does KL(y || p_i) <= KL(y || q) - (1 - alpha) / alpha * KL(q || p_i): depth can only help.
    """
    options = {"divergence": divergence, "label_smoothing": label_smoothing, "dtype": dtype}
    return means(*tally(network, batches, alphas, **options))


@torch.no_grad()
def tally(
    network: SIDNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    alphas: Sequence[float],
    *,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int]:
    """The sums (3, L) float64 that `evaluate` divides by the number of images, and that number."""
    network.eval()
    sums, count = 0, 0
    for inputs, targets in batches:
        with autocast(inputs, dtype):
            every = network.stage_logits(inputs)
        prior = network.uniform(at_least_float32(every[0]))
        sums, count = sums + judged(every, prior, targets, alphas, divergence, label_smoothing), count + len(targets)
    return sums.cpu(), count


def means(sums: Tensor, count: int) -> dict[str, list[float]]:
    return dict(zip(("accuracy", "kl", "certificate"), (sums / count).tolist(), strict=True))


def judged(
    every: Sequence[Tensor],
    prior: Tensor,
    targets: Tensor,
    alphas: Sequence[float],
    divergence: str = "forward",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sums over a batch, (3, L) float64, of what `evaluate` says of each stage, from the logits (B, C) of each and the
    prior (B, C) of the first."""
    options = {"divergence": divergence, "label_smoothing": label_smoothing, "reduction": "none"}
    rows = []
    for logits, alpha in zip(map(at_least_float32, every), alphas, strict=True):
        loss = fused_local_loss(logits, prior, targets, alpha, **options).loss
        copied = prior.clamp_min(torch.finfo(prior.dtype).tiny).log()
        copied_loss = fused_local_loss(copied, prior, targets, alpha, **options).loss
        kl = F.cross_entropy(logits, targets, reduction="none")
        right = logits.argmax(dim=1) == targets
        no_worse = loss <= copied_loss + ROUNDING * (1 + copied_loss)
        rows.append(torch.stack([row.double().sum() for row in (right, kl, no_worse)]))
        prior = logits.softmax(dim=1)  # as the next stage's head has it
    return torch.stack(rows, dim=1)
