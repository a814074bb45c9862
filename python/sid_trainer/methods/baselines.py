"""Backpropagation and deep supervision, with which SID is compared on the same network, data and optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..network.modules import at_least_float32
from ..network.own import Network
from .common import StepResult, autocast, check_owned, forward_dtype
from .updates import Optimizers, clear_gradients, update


def bp_step(
    network: Network, inputs: Tensor, targets: Tensor, optimizers: Optimizers = (), *, checkpointed: bool = False,
    parts: int = 1, label_smoothing: float = 0.0, dtype: torch.dtype = torch.float32,
) -> StepResult:  # fmt: skip
    """Backpropagate the last stage's cross-entropy through the whole network.

    Args:
        inputs, targets, label_smoothing, dtype: As in `sid_step`.
        optimizers: Optimizers of the network's parameters. Gradients they own are cleared first.
        checkpointed: Hold only the tensors between blocks, and run each block again in the backward pass.
        parts: Number of parts of the batch that run one after the other; batch-norm sees one part at a time.

    Returns the loss (1,) and the last logits (B, C). Raises ValueError if an optimizer owns other parameters.
    """
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    total, outputs = torch.zeros((), device=inputs.device), []
    call = [recompute_in_backward] if checkpointed else []
    parts = max(1, min(parts, len(inputs) // 2))  # batch-norm needs two examples
    with forward_dtype(inputs, dtype) as dtype:
        x_parts = inputs.tensor_split(parts)
        rows = len(targets) // max(1, len(inputs))  # more than 1 if every token is an example of its own
        for x, y in zip(x_parts, targets.split([len(x) * rows for x in x_parts]), strict=True):
            with autocast(inputs, dtype):
                logits = at_least_float32(network.stage_logits(x, *call)[-1])
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing) * (len(y) / len(targets))
            loss.backward()
            total += loss.detach()
            outputs.append(logits.detach())
        update(optimizers)
    return StepResult(total.reshape(1), torch.cat(outputs))


def recompute_in_backward(module: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call `module` without holding its activations; the backward pass computes them again."""
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(module))
    )


@contextmanager
def frozen_statistics(module: Callable[..., Any]) -> Iterator[None]:
    """Do not update the running statistics of batch-norm within the context: they include this batch already."""
    layers = module.modules() if isinstance(module, nn.Module) else ()
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, values in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = values


def deep_supervision_step(
    network: Network, inputs: Tensor, targets: Tensor, optimizers: Optimizers = (), *,
    label_smoothing: float | Sequence[float] = 0.0, dtype: torch.dtype = torch.float32,
) -> StepResult:  # fmt: skip
    """Backpropagate the sum of all heads' cross-entropies through features and beliefs.

    The arguments are those of `bp_step`, and label smoothing may be one number per stage. Returns the losses (L,) and
    the last logits (B, C).
    """
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    with forward_dtype(inputs, dtype) as dtype:
        with autocast(inputs, dtype):
            stage_logits = [at_least_float32(logits) for logits in network.stage_logits(inputs)]
        smoothing = label_smoothing if isinstance(label_smoothing, Sequence) else [label_smoothing] * len(stage_logits)
        losses = [
            F.cross_entropy(logits, targets, label_smoothing=share)
            for logits, share in zip(stage_logits, smoothing, strict=True)
        ]
        stage_loss = torch.stack(losses)
        stage_loss.sum().backward()
        update(optimizers)
    return StepResult(stage_loss.detach(), stage_logits[-1].detach())
