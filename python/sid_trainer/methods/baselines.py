"""Every method by name: SID, and what it should be compared with on the same network, data and optimizer.

`sid` and `greedy` train each stage locally. `deep-supervision` backpropagates the sum of all heads' cross-entropies, no
detach. `bp` backpropagates the last cross-entropy through the whole network; `bp-checkpoint` computes every block again
on the way back in place of holding it, `bp-accumulate` sums the gradients of parts of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.checkpoint import checkpoint

from sid_kernels.cascade.dispatch import bytes_of_a_group

from ..network.modules import SIDNetwork, at_least_float32
from .stacked import StackedStages, stacked_stages
from .step import Alpha, Optimizers, StepResult, autocast, check_owned, clear_gradients, sid_step, update
from .streams import StageStreams


def bp_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    optimizers: Optimizers = (),
    *,
    checkpointed: bool = False,
    parts: int = 1,
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Backpropagation of the last stage's cross-entropy through the whole network.

    checkpointed: hold only what passes between blocks, and run each block again in the backward pass.
    parts: run the batch in so many parts, one after the other; batch-norm then sees a part at a time.
    """
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    total, outputs = torch.zeros((), device=inputs.device), []
    call = {"call": run_again_backward} if checkpointed else {}
    parts = max(1, min(parts, len(inputs) // 2))  # batch-norm needs two examples
    for x, y in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
        with autocast(inputs, dtype):
            logits = network.stage_logits(x, **call)[-1]
        loss = F.cross_entropy(at_least_float32(logits), y, label_smoothing=label_smoothing) * (len(y) / len(targets))
        loss.backward()
        total += loss.detach()
        outputs.append(logits.detach())
    update(optimizers)
    return StepResult(total.reshape(1), torch.cat(outputs))


def run_again_backward(module: nn.Module, *inputs: Tensor) -> Any:
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), unchanged_statistics(module))
    )


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Within it batch-norm, which has seen this batch already, keeps its running statistics as they are."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = kept


def deep_supervision_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    optimizers: Optimizers = (),
    *,
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """One backward over the sum of all heads' cross-entropies, through features and beliefs alike."""
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    with autocast(inputs, dtype):
        logits = network.stage_logits(inputs)
    losses = [F.cross_entropy(at_least_float32(z), targets, label_smoothing=label_smoothing) for z in logits]
    losses = torch.stack(losses)
    losses.sum().backward()
    update(optimizers)
    return StepResult(losses.detach(), logits[-1].detach())


LOCAL = ("sid", "greedy")  # no gradient crosses stages
BACKPROPAGATED = {  # one cross-entropy, the last; on a stagewise backbone they train it with a plain linear classifier
    "bp": {}, "bp-checkpoint": {"checkpointed": True}, "bp-accumulate": {"parts": 4},
}  # fmt: skip
METHODS = (*LOCAL, "deep-supervision", *BACKPROPAGATED)
CROSS_ENTROPY = {"alpha": 1.0, "divergence": "forward"}  # what the stages of all but sid learn


def make_step(
    method: str,
    network: SIDNetwork,
    optimizers: Optimizers,
    *,
    alpha: Alpha = 0.5,
    schedule: str = "one-pass",
    fused: bool = True,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
    streams: StageStreams | None = None,
) -> Callable[[Tensor, Tensor], StepResult]:
    """The training step `step(inputs, targets)` of a method; each takes of the settings what has a meaning for it."""
    common = {"label_smoothing": label_smoothing, "dtype": dtype}
    if method in LOCAL:
        common |= {"alpha": alpha, "divergence": divergence} if method == "sid" else CROSS_ENTROPY
        return partial(
            sid_step, network, optimizers=optimizers, schedule=schedule, fused=fused, streams=streams, **common
        )
    if method == "deep-supervision":
        return partial(deep_supervision_step, network, optimizers=optimizers, **common)
    return partial(bp_step, network, optimizers=optimizers, **BACKPROPAGATED[method], **common)


def fused_stages(network: SIDNetwork, method: str, schedule: str, fused: bool) -> StackedStages | None:
    """The stages that the method's step hands to the fused cascade, all of them or None."""
    return stacked_stages(network) if fused and method in LOCAL and schedule == "one-pass" else None


def held_by_cascade(network: SIDNetwork, method: str, rows: int, schedule: str = "one-pass", fused: bool = True) -> int:
    """Bytes that the fused cascade holds in a step on so many rows: autograd knows nothing of them."""
    stacked = fused_stages(network, method, schedule, fused)
    return 0 if stacked is None else bytes_of_a_group(stacked.weights, rows)


OPTIMIZERS = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": partial(SGD, momentum=0.9, nesterov=True),
}


def make_optimizers(
    network: SIDNetwork, method: str = "sid", *, optimizer: str = "adam", lr: float = 1e-3, weight_decay: float = 0.0,
    schedule: str = "one-pass", fused: bool = True,
) -> list[Optimizer | None]:  # fmt: skip
    """Those a method's step takes. Fused, because many optimizers of 4 small tensors are all overhead: 11 took 2.0 ms a
    step in place of 3.7 on 2 CPU cores.

    Local methods: one for the extractor and one a stage, or one for all stages where they are equal, stacked: the same
    numbers in one update; None where there are no parameters, or on meta. The others: one for everything.
    """

    def make(parameters: Sequence[Tensor]) -> Optimizer | None:
        if not parameters or parameters[0].is_meta:
            return None
        fused = optimizer != "sgd" or not hasattr(parameters[0], "to_local")  # PyTorch has no fused SGD for shards
        return OPTIMIZERS[optimizer](parameters, lr=lr, weight_decay=weight_decay, fused=fused)

    if method not in LOCAL or schedule == "reference":
        return [make(list(network.parameters()))]
    stacked = fused_stages(network, method, schedule, fused)
    stages = [list(stage.parameters()) for stage in network.stages] if stacked is None else [stacked.parameters()]
    return [make(parameters) for parameters in (list(network.extractor.parameters()), *stages)]


LR_SCHEDULES = ("constant", "cosine", "one-cycle")


def make_scheduler(optimizer: Optimizer, name: str, lr: float, steps: int) -> LRScheduler:
    """The learning rate at each of `steps` steps; `lr` is its highest."""
    if name == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if name == "one-cycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=False)
    return ConstantLR(optimizer, factor=1.0)
