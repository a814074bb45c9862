"""The SID step of a language model whose losses are computed in chunks, without holding the logits of all tokens."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sid_kernels import fused_belief_head
from sid_kernels.belief_head.problem import PriorHead

from ..network.language import LanguageModel
from .common import StepOptions, StepResult, autocast
from .streams import StageHooks
from .updates import Optimizers, clear_gradients, update

MOST_BYTES = 64 << 20  # of float32 logits (N, V); below, holding them is faster than computing the prior's twice


class PredictedResult(StepResult):
    """The result of a step that holds no logits: `logits` is empty, (0, C), and `predictions` (B,) are classes."""

    predictions: Tensor

    def correct(self, targets: Tensor) -> Tensor:
        return (self.predictions == targets).sum()


def rows_at_once(network: LanguageModel) -> int:
    """Return the number of rows whose logits take at most MOST_BYTES."""
    return MOST_BYTES // (4 * network.num_classes)


def trains_in_chunks(network: object, rows: int, options: StepOptions) -> bool:
    """Return whether `train_readouts` trains a network: a language model whose logits take more than MOST_BYTES."""
    one_pass = options.fused and options.step_schedule == "one-pass" and options.class_weight is None
    return one_pass and isinstance(network, LanguageModel) and rows > rows_at_once(network)


def windows_at_once(network: LanguageModel, context: int) -> int:
    """Return the number of windows of `context` tokens that an evaluation takes at once."""
    return max(1, rows_at_once(network) // context)


def in_parts(network: object, batches: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield batches as they are, or those of a language model in parts whose logits of a stage are not large."""
    for inputs, targets in batches:
        if isinstance(network, LanguageModel):
            length = inputs.shape[1]
            windows = windows_at_once(network, length)
            yield from zip(inputs.split(windows), targets.split(windows * length), strict=True)
        else:
            yield inputs, targets


def readout_weight(stage: nn.Module) -> Tensor:
    """Return the weight (V, D) of a stage's readout; DistributedDataParallel has the stage as `module`."""
    weight = getattr(stage, "module", stage).get_submodule("head").weight
    assert isinstance(weight, Tensor)  # for type checkers
    return weight


def train_readouts(
    network: LanguageModel, inputs: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = (),
    hooks: StageHooks | None = None, prior: PriorHead | None = None, predicts: bool = True,
) -> PredictedResult:  # fmt: skip
    """Train the stages one by one on tokens (B, T) and next tokens (B * T,), as `stage_by_stage` does.

    The belief of the stage before is computed again from its features and weight, so a stage's weight is updated only
    when the next stage has its loss. `prior` is that of the first of these stages if other processes run stages before
    it; without `predicts`, the predictions are -1.
    """
    clear_gradients(optimizers)
    hooks = hooks or StageHooks()
    pending, losses = optimizers[:0], []
    with autocast(inputs, options.dtype):
        features = network.extractor(inputs)
    hooks.step_started()
    stages, alphas = network.local_modules[1:], options.stage_alphas(network.depth)
    for i, (stage, alpha) in enumerate(zip(stages, alphas, strict=True)):
        with hooks.run_stage(i):
            with autocast(inputs, options.dtype):
                features, hidden = stage(features, None)
                weight = readout_weight(stage)
                own = PriorHead(hidden.detach(), weight.detach(), None)  # of the next stage
                hooks.outputs_ready(features, own)
                loss = fused_belief_head(
                    hidden, weight, None, prior, targets, alpha, return_belief=False, **options.loss_of_stage(i)
                ).loss
            if loss.requires_grad:  # False if the stage is frozen
                loss.backward()
            update(pending)
        pending = optimizers[1 + i : 2 + i]
        losses.append(loss.detach())
        features, prior = features.detach(), own
    hooks.step_finished()
    assert prior is not None
    hidden, weight, _ = prior
    rows = max(1, rows_at_once(network))
    result = PredictedResult(torch.stack(losses), hidden.new_empty(0, network.num_classes))
    result.predictions = torch.full_like(targets, -1)
    if predicts:
        with torch.no_grad():
            parts = hidden.split(rows)
            result.predictions = torch.cat([(part @ weight.T.to(part.dtype)).argmax(1) for part in parts])
    update([*pending, *optimizers[:1]])  # the extractor has its gradient from the first stage
    return result
