"""Options, results, argument checks and teacher beliefs that all training steps share."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sid_kernels.core.options import HALF

from ..network.heads import StackedHeads
from ..network.loss_options import StageLossOptions
from ..network.modules import SIDNetwork, at_least_float32
from ..network.own import Network
from .updates import Optimizers

STEP_SCHEDULES = ("one-pass", "two-phase", "reference")


class StepResult(NamedTuple):
    """The losses and logits of a training step."""

    stage_loss: Tensor  # (L,) float32, on the network's device; (1,) for backpropagation: the last stage's
    logits: Tensor  # (B, C) of the last stage before the update, detached

    def correct(self, targets: Tensor) -> Tensor:
        """Return how many of the targets (B,) the last stage predicted, as a tensor ()."""
        return (self.logits.argmax(dim=1) == targets).sum()


@dataclass(frozen=True)
class StepOptions(StageLossOptions):
    """The options of a training step, described in `sid_step`. Raises ValueError for a value that is not allowed."""

    dtype: torch.dtype = torch.float32
    step_schedule: str = "one-pass"
    fused: bool = True

    def __post_init__(self) -> None:
        if self.step_schedule not in STEP_SCHEDULES:
            raise ValueError(f"step schedule must be one of {', '.join(STEP_SCHEDULES)}, not {self.step_schedule!r}")
        if self.step_schedule == "reference" and self.class_weight is not None:
            raise ValueError("class_weight must be None for the schedule 'reference'")
        super().__post_init__()

    @property
    def trains_at_once(self) -> bool:
        """Whether a step trains all stages of `StackedHeads` at once, not one by one."""
        one_smoothing = not isinstance(self.label_smoothing, Sequence)
        return self.fused and self.step_schedule == "one-pass" and one_smoothing and self.class_weight is None


def autocast(inputs: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return autocast to `dtype` on the inputs' device; for float32 it is disabled."""
    device = inputs.device.type
    if dtype is torch.float32 and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


@contextmanager
def forward_dtype(inputs: Tensor, dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Yield `dtype`, or that of the caller's autocast if `dtype` is float32, and disable autocast within the context.

    A step enables it for its forward passes only: backward passes and updates do not run under autocast.
    """
    device = inputs.device.type
    if dtype is torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype


def check_network(network: SIDNetwork) -> None:
    """Raise TypeError unless `network` is a `SIDNetwork`; warn if there are several processes.

    Wrappers such as DistributedDataParallel reduce gradients only in backward passes that follow their own `forward`.
    """
    if not isinstance(network, SIDNetwork):
        raise TypeError(
            f"network must be a SIDNetwork, not {type(network).__name__}; networks that are wrapped or cut by names"
            " train by network(inputs, targets).loss.backward()"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"sid_step does not reduce gradients over the {dist.get_world_size()} processes, also if the network is"
            " inside DistributedDataParallel: call the wrapper, as in ddp(inputs, targets).loss.backward(), or use"
            " `sid train --parallel data`",
            stacklevel=3,
        )


@torch.no_grad()
def teacher_beliefs(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the belief (B, C) of every stage without gradients; entry i is the prior of stage i + 1."""
    with autocast(inputs, dtype):
        return [at_least_float32(logits).softmax(dim=1) for logits in network.stage_logits(inputs)]


def owned_parameters(optimizers: Optimizers) -> set[int]:
    """Return the `id` of every parameter that the optimizers own."""
    groups = (group for optimizer in optimizers if optimizer for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def check_sequence(optimizers: Optimizers) -> None:
    """Raise TypeError for a single optimizer instead of a sequence of them."""
    if isinstance(optimizers, Optimizer):
        raise TypeError(
            f"optimizers must be a list of optimizers, not a single {type(optimizers).__name__}; to use one optimizer,"
            " call network(inputs, targets).loss.backward() and then its step"
        )


def check_parameter_dtype(network: SIDNetwork) -> None:
    """Raise ValueError if the stages have parameters in half precision: beliefs are float32."""
    stages = [network.stages] if isinstance(network.stages, StackedHeads) else network.stages
    first = (next(stage.parameters(), None) for stage in stages)  # the first parameter of each stage
    parameter = next((p for p in first if p is not None and p.dtype in HALF), None)
    if parameter is not None:
        raise ValueError(
            f"network must have float32 or float64 parameters, not {parameter.dtype}; for mixed precision keep them in"
            f" float32 and use dtype={parameter.dtype} or autocast, or call network(inputs, targets).loss.backward()"
        )


def check_owned(optimizers: Optimizers, network: Network) -> None:
    """Raise ValueError if an optimizer owns a parameter that is not the network's."""
    check_sequence(optimizers)
    if not owned_parameters(optimizers) <= {id(parameter) for parameter in network.parameters()}:
        raise ValueError("optimizers must be over the network's own parameters; one owns other tensors")


def check_optimizers(optimizers: Optimizers, network: SIDNetwork) -> None:
    """Raise ValueError unless there are no optimizers or one for each of the network's `local_modules`."""
    check_sequence(optimizers)
    if not optimizers:
        return
    owned, expected = owned_parameters(optimizers[1:]), len(network.local_modules)
    own = any(id(parameter) in owned for parameter in network.stages.parameters())  # stops at the first
    if len(optimizers) != expected or not (own or next(network.stages.parameters(), None) is None):
        raise ValueError(
            f"optimizers must be {expected} over the network's own parameters, one for the extractor and one for"
            f" {'all stages' if isinstance(network.stages, StackedHeads) else 'each stage'}, not {len(optimizers)}"
            f"{'' if own else ' over other parameters'}"
        )
