"""Make the training step and the optimizers of a method by its name.

`sid` and `greedy` train each stage locally. `deep-supervision` backpropagates the sum of all heads' cross-entropies.
`bp` backpropagates the last cross-entropy through the whole network, `bp-checkpoint` computes activations again in the
backward pass instead of holding them, and `bp-accumulate` sums the gradients of parts of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from sid_kernels.cascade.dispatch import bytes_of_a_group

from ..network.cut_network import CutNetwork
from ..network.heads import StackedHeads
from ..network.modules import SIDNetwork
from ..network.own import Network
from .baselines import bp_step, deep_supervision_step
from .common import StepOptions, StepResult
from .drop_in import drop_in_step
from .step import local_step
from .streams import StageHooks
from .updates import Optimizers

LOCAL = ("sid", "greedy")  # no gradient crosses stages
# Methods with the cross-entropy of the last stage alone. A stagewise backbone has one linear classifier for them.
BACKPROPAGATED: dict[str, dict[str, Any]] = {
    "bp": {},
    "bp-checkpoint": {"checkpointed": True},
    "bp-accumulate": {"parts": 4},
}
METHODS = (*LOCAL, "deep-supervision", *BACKPROPAGATED)
CROSS_ENTROPY: dict[str, Any] = {"alpha": 1.0, "divergence": "forward"}  # the loss of all methods except sid


def make_step(
    method: str, network: Network, optimizers: Optimizers, options: StepOptions | None = None,
    hooks: StageHooks | None = None,
) -> Callable[[Tensor, Tensor], StepResult]:  # fmt: skip
    """Return the training step `step(inputs, targets)` of a method, which uses the options that apply to it."""
    options = options or StepOptions()
    if isinstance(network, CutNetwork) and (method == "bp-checkpoint" or options.step_schedule != "one-pass"):
        given = f"method {method!r}" if method == "bp-checkpoint" else f"schedule {options.step_schedule!r}"
        raise ValueError(f"{given} is not for networks that are cut by names; cut an nn.Sequential by indices")
    if method not in LOCAL and options.class_weight is not None:
        raise ValueError(f"class_weight must be None for method {method!r}: it is for {' and '.join(LOCAL)}")
    if method in LOCAL:
        options = options if method == "sid" else replace(options, **CROSS_ENTROPY)
        if isinstance(network, CutNetwork):
            return partial(drop_in_step, network, options=options, optimizers=optimizers or ())
        return partial(local_step, network, options=options, optimizers=optimizers or (), hooks=hooks)
    common: dict[str, Any] = {"optimizers": optimizers, "dtype": options.dtype}
    if method == "deep-supervision":
        return partial(deep_supervision_step, network, label_smoothing=options.label_smoothing, **common)
    last_smoothing = options.loss_of_stage(-1)["label_smoothing"]
    return partial(bp_step, network, label_smoothing=last_smoothing, **BACKPROPAGATED[method], **common)


def cascade_bytes(network: Network, method: str, rows: int, options: StepOptions) -> int:
    """Return the bytes that the fused cascade holds in a step on `rows` examples; autograd does not count them."""
    stages = network.stages if isinstance(network, SIDNetwork) else None
    if method in LOCAL and isinstance(stages, StackedHeads) and options.trains_at_once:
        return bytes_of_a_group(stages.weights, rows)
    return 0


OPTIMIZERS: dict[str, Any] = {"adam": Adam, "adamw": AdamW, "sgd": partial(SGD, momentum=0.9, nesterov=True)}


def make_optimizers(
    network: Network, method: str = "sid", *, optimizer: str = "adam", lr: float = 1e-3, weight_decay: float = 0.0,
    step_schedule: str = "one-pass",
) -> list[Optimizer | None]:  # fmt: skip
    """Return the optimizers that a method's step takes.

    Local methods: one for each of `network.local_modules`, None if it has no parameters or they are on the meta device.
    Other methods, networks cut by names and the schedule "reference": one for the whole network.
    All are PyTorch's fused ones: 11 of them, with few small tensors each, took 2.0 instead of 3.7 ms on 2 CPU cores.
    """

    def make(parameters: Sequence[Tensor]) -> Optimizer | None:
        if not parameters or parameters[0].is_meta:
            return None
        fused = optimizer != "sgd" or not hasattr(parameters[0], "to_local")  # PyTorch has no fused SGD for shards
        return OPTIMIZERS[optimizer](parameters, lr=lr, weight_decay=weight_decay, fused=fused)

    if method not in LOCAL or step_schedule == "reference" or isinstance(network, CutNetwork):
        return [make(list(network.parameters()))]
    return [make(list(module.parameters())) for module in network.local_modules]


LR_SCHEDULES = ("constant", "cosine", "one-cycle")


def make_lr_scheduler(optimizer: Optimizer, lr_schedule: str, lr: float, steps: int) -> LRScheduler:
    """Return the scheduler of the learning rate over `steps` steps; `lr` is its highest value."""
    if lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if lr_schedule == "one-cycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=False)
    return ConstantLR(optimizer, factor=1.0)
