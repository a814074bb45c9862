"""The SID step of a language model whose losses are computed in chunks, without holding the logits of all tokens."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sid_kernels import fused_belief_head
from sid_kernels.belief_head.problem import PriorHead

from ..network.language import LanguageModel
from .common import Optimizers, StepOptions, StepResult, autocast, clear_gradients, update

MOST_BYTES = 64 << 20  # of float32 logits (N, V); below, holding them is faster than computing the prior's twice


class PredictedResult(StepResult):
    """The result of a step that holds no logits: `logits` is empty, (0, C), and `predictions` (B,) are classes."""

    predictions: Tensor

    def correct(self, targets: Tensor) -> Tensor:
        return (self.predictions == targets).sum()


def rows_at_once(network: LanguageModel) -> int:
    """Return the number of rows whose logits take at most MOST_BYTES."""
    return MOST_BYTES // (4 * network.num_classes)


def is_large(network: LanguageModel, targets: Tensor) -> bool:
    """Return whether logits for all targets (N,) would take more than MOST_BYTES."""
    return len(targets) > rows_at_once(network)


def in_parts(network: object, batches: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield batches as they are, or those of a language model in parts whose logits of a stage are not large."""
    for inputs, targets in batches:
        if isinstance(network, LanguageModel) and is_large(network, targets):
            length = inputs.shape[1]
            rows = max(1, rows_at_once(network) // length)
            yield from zip(inputs.split(rows), targets.split(rows * length), strict=True)
        else:
            yield inputs, targets


def readout_weight(stage: nn.Module) -> Tensor:
    """Return the weight (V, D) of a stage's readout; DistributedDataParallel has the stage as `module`."""
    weight = getattr(stage, "module", stage).get_submodule("head").weight
    assert isinstance(weight, Tensor)  # for type checkers
    return weight


def train_readouts(
    network: LanguageModel, inputs: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = ()
) -> PredictedResult:
    """Train the stages one by one on tokens (B, T) and next tokens (B * T,), as `stage_by_stage` does.

    The belief of the stage before is computed again from its features and weight, so a stage's weight is updated only
    when the next stage has its loss.
    """
    clear_gradients(optimizers)
    pending, losses = optimizers[:0], []
    with autocast(inputs, options.dtype):
        features = network.extractor(inputs)
    prior: PriorHead | None = None
    stages, alphas = network.local_modules[1:], options.stage_alphas(network.depth)
    for i, (stage, alpha) in enumerate(zip(stages, alphas, strict=True)):
        with autocast(inputs, options.dtype):
            features, hidden = stage(features, None)
            weight = readout_weight(stage)
            loss = fused_belief_head(
                hidden, weight, None, prior, targets, alpha, return_belief=False, **options.loss_of_stage(i)
            ).loss
        if loss.requires_grad:  # False if the stage is frozen
            loss.backward()
        update(pending)
        pending = optimizers[1 + i : 2 + i]
        losses.append(loss.detach())
        features, prior = features.detach(), PriorHead(hidden.detach(), weight.detach(), None)
    assert prior is not None
    hidden, weight, _ = prior
    rows = max(1, rows_at_once(network))
    with torch.no_grad():
        result = PredictedResult(torch.stack(losses), hidden.new_empty(0, network.num_classes))
        result.predictions = torch.cat([(part @ weight.T.to(part.dtype)).argmax(1) for part in hidden.split(rows)])
    update([*pending, *optimizers[:1]])  # the extractor has its gradient from the first stage
    return result
