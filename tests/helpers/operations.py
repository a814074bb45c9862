"""The three differentiable operations on small inputs, and the same losses in plain PyTorch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import CascadeWeights, fused_belief_head, fused_local_loss, refine_cascade

ROWS, CLASSES, HIDDEN_DIM, STAGES, ALPHA = 4, 5, 6, 2, 0.3
NAMES = ("loss", "head", "cascade")


class Operation(NamedTuple):
    """An operation: `fused` and `plain` map the tensors of `inputs` to the loss; options go to the operation."""

    fused: Any
    plain: Any
    inputs: tuple[Tensor, ...]


def plain_loss(logits: Tensor, prior: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the forward local loss of labels, of which -100 is ignored."""
    log_p, counts = logits.log_softmax(-1), target != -100
    fidelity = -log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    consistency = (prior * (prior.log() - log_p)).sum(-1)
    losses = (ALPHA * fidelity + (1 - ALPHA) * consistency) * counts
    return losses if reduction == "none" else losses.sum() / counts.sum().clamp(min=1)


def make_operation(name: str) -> Operation:
    """Return an operation with inputs drawn from a fixed seed; one row is ignored."""
    draw = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    target = torch.randint(0, CLASSES, (ROWS,), generator=draw)
    target[1] = -100
    prior = randn(ROWS, CLASSES).softmax(1)
    if name == "loss":
        return Operation(
            lambda z, **options: fused_local_loss(z, prior, target, ALPHA, **options).loss,
            lambda z, **options: plain_loss(z, prior, target, **options),
            (randn(ROWS, CLASSES),),
        )
    features = randn(ROWS, HIDDEN_DIM)
    if name == "head":
        return Operation(
            lambda h, w, b, **options: fused_belief_head(h, w, b, prior, target, ALPHA, **options).loss,
            lambda h, w, b, **options: plain_loss(F.linear(h, w, b), prior, target, **options),
            (features, randn(CLASSES, HIDDEN_DIM), randn(CLASSES)),
        )

    def plain_cascade(f: Tensor, *weights: Tensor) -> Tensor:
        total, belief = f.new_zeros(()), prior.to(f.dtype)
        for w, b, v, c in zip(*weights, strict=True):
            logits = F.linear(F.linear(torch.cat((belief, f), 1), w, b).relu(), v, c)
            total, belief = total + plain_loss(logits, belief, target), logits.softmax(1).detach()
        return total

    shapes = ((7, CLASSES + HIDDEN_DIM), (7,), (CLASSES, 7), (CLASSES,))
    return Operation(
        lambda f, *weights: refine_cascade(f, CascadeWeights(*weights), target, ALPHA, prior=prior.to(f.dtype)).loss,
        plain_cascade,
        (features, *(randn(STAGES, *shape) for shape in shapes)),
    )
