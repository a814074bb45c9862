"""What every stage knows of a split: accuracy, distance to the truth, and how often the descent certificate holds."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import fused_local_loss

from .network import SIDNetwork, at_least_float32
from .step import autocast

# A stage that copies its prior repeats its loss to 1.4e-6 of 1 + loss (2000 images, C up to 1000, both divergences).
ROUNDING = 2e-6


@torch.no_grad()
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
    network.eval()
    options = {"divergence": divergence, "label_smoothing": label_smoothing, "reduction": "none"}
    count, sums = 0, 0
    for inputs, targets in batches:
        with autocast(inputs, dtype):
            every = network.stage_logits(inputs)
        prior, rows = network.uniform(at_least_float32(every[0])), []
        for logits, alpha in zip(map(at_least_float32, every), alphas, strict=True):
            local = fused_local_loss(logits, prior, targets, alpha, **options)
            copied = fused_local_loss(
                prior.clamp_min(torch.finfo(prior.dtype).tiny).log(), prior, targets, alpha, **options
            )
            kl = F.cross_entropy(logits, targets, reduction="none")
            right = logits.argmax(dim=1) == targets
            no_worse = local.loss <= copied.loss + ROUNDING * (1 + copied.loss)
            rows.append(torch.stack([row.double().sum() for row in (right, kl, no_worse)]))
            prior = local.belief
        sums, count = sums + torch.stack(rows, dim=1), count + len(targets)  # (3, L)
    return dict(zip(("accuracy", "kl", "certificate"), (sums / count).tolist(), strict=True))
