"""Infer which dimension of features holds the channels, from the layers that computed them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

FIRST = ("Conv1d", "Conv2d", "Conv3d", "BatchNorm", "GroupNorm", "InstanceNorm", "Pool1d", "Pool2d", "Pool3d")
ELEMENTWISE = ("ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "LeakyReLU", "Hardswish", "Tanh", "Dropout", "Identity")
LAST = ("Linear", "Embedding", "Conv1D")  # Conv1D: the linear layer of GPT-2


class Output(NamedTuple):
    """What a module returned when it ran."""

    module: nn.Module
    input: object  # its first argument
    tensor: Tensor


@contextmanager
def record_outputs(model: nn.Module, ran: set[str] | None = None) -> Iterator[list[Output]]:
    """Yield a list to which every module that runs within the context adds its output, if that is a tensor.

    The names of the modules that run, whatever they return, are added to `ran`.
    """
    outputs: list[Output] = []
    names = set[str]() if ran is None else ran

    def add(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        names.add(name)
        if isinstance(output, Tensor):
            outputs.append(Output(module, inputs[0] if inputs else None, output))

    handles = [module.register_forward_hook(partial(add, name)) for name, module in model.named_modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def infer_channels(outputs: list[Output], features: Tensor) -> str | None:
    """Infer whether the channels of features (B, ...) are "first" or "last"; return None if the layers do not tell.

    The layers whose output has the features' shape decide, and must agree. Convolutions, pooling and batch-norm mean
    "first", linear layers "last", other norms what the size of their weight fits. Without such layers, those decide
    whose output has another number of channels but otherwise that shape, as before a concatenation. If the first and
    the last size are equal, a permutation would not show, so only the layer that made the features decides.
    """
    shape = tuple(features.shape)
    if len(shape) == 2:
        return "last"
    if shape[1] == shape[-1]:
        return channels_of_maker(outputs, features)
    shapes = [(output.module, tuple(output.tensor.shape)) for output in outputs if output.tensor.dim() == len(shape)]
    votes = {channels_of(module, shape) for module, size in shapes if size == shape} - {None}
    if not votes:
        first = any(size[2:] == shape[2:] and channels_of(module, size) == "first" for module, size in shapes)
        last = any(size[:-1] == shape[:-1] and channels_of(module, size) == "last" for module, size in shapes)
        votes = {"first"} if first and not last else {"last"} if last and not first else set()
    return votes.pop() if len(votes) == 1 else None


def channels_of_maker(outputs: list[Output], features: Tensor) -> str | None:
    """Return where the layer before activations and dropout that made the features puts its channels, or None."""
    tensor: object = features
    for output in reversed(outputs):
        if output.tensor is tensor and not list(output.module.children()):
            if channels := channels_of(output.module, tuple(features.shape)):
                return channels
            if not any(kind.__name__ in ELEMENTWISE for kind in type(output.module).__mro__):
                return None
            tensor = output.input
    return None


def channels_of(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Return where a layer whose output has `shape` (B, ...) puts its channels, or None if it does not tell."""
    names = [kind.__name__ for kind in type(module).__mro__]
    if any(part in name for name in names for part in FIRST):
        return "first"
    if any(name in LAST for name in names):
        return "last"
    weight = getattr(module, "weight", None)
    if "Norm" in names[0] and isinstance(weight, Tensor) and weight.dim() == 1 and shape[1] != shape[-1]:
        return {shape[1]: "first", shape[-1]: "last"}.get(len(weight))
    return None
