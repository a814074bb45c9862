"""Which dimension of a module's features holds the channels, told from the layers that computed them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

FIRST = ("Conv1d", "Conv2d", "Conv3d", "BatchNorm", "GroupNorm", "InstanceNorm", "Pool1d", "Pool2d", "Pool3d")
LAST = ("Linear", "Embedding", "Conv1D")  # Conv1D: the linear layer of GPT-2


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[nn.Module, tuple[int, ...]]]]:
    """Yield a list to which every module that runs within the context adds itself and its output's shape."""
    outputs: list[tuple[nn.Module, tuple[int, ...]]] = []

    def add(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, tuple(output.shape)))

    handles = [module.register_forward_hook(add) for module in model.modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def infer_channels(outputs: list[tuple[nn.Module, tuple[int, ...]]], shape: tuple[int, ...]) -> str | None:
    """Return "first" or "last" for features of `shape` (B, ...), or None if the layers do not tell.

    Layers whose output has the features' shape tell it: convolutions, pooling and batch-norm "first", linear layers
    "last", other norms by the size of their weight. They must agree. If there are none, layers tell it whose output
    differs from the features in the number of channels alone, as where features are concatenated.
    """
    if len(shape) == 2:
        return "last"
    votes = {channels_of(module, shape) for module, output in outputs if output == shape} - {None}
    if not votes:
        like = [(module, output) for module, output in outputs if len(output) == len(shape)]
        first = any(o[2:] == shape[2:] and channels_of(module, o) == "first" for module, o in like)
        last = any(o[:-1] == shape[:-1] and channels_of(module, o) == "last" for module, o in like)
        votes = {"first"} if first and not last else {"last"} if last and not first else set()
    return votes.pop() if len(votes) == 1 else None


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
