"""Define the operators `torch.ops.sid_kernels.*`, which torch.compile, export and fake tensors see.

`Library.define` and `impl` have a third of the overhead of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autograd import functorch_stack, is_compiling, scale_gradients
from .options import compute_dtype

# The options' part of a schema. Its values are the arguments of `LossOptions`.
OPTIONS_SCHEMA = "str divergence, float label_smoothing, int ignore_index, str reduction"

_library = torch.library.Library("sid_kernels", "DEF")


def define_operator(
    schema: str,
    run: Callable[..., Sequence[Tensor]],
    fake: Callable[..., Sequence[Tensor]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple],
) -> Any:
    """Define an operator for CPU and CUDA and return it.

    schema: as `torch.library.define` takes it; the first output is the loss, the only differentiable one.
    run, fake: called with all arguments in order. fake returns outputs of the right shapes, without values.
    setup_context, backward: as `torch.library.register_autograd` takes them.
    """
    operator = define_function(schema, run, fake)
    torch.library.register_autograd(operator.name(), backward, setup_context=setup_context, lib=_library)
    return operator


def define_function(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator without autograd for CPU and CUDA and return it; see `define_operator`."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"sid_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.sid_kernels, name).default


def count_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Register how many operations `torch.utils.flop_counter.FlopCounterMode` counts for an operator.

    formula: takes the operator's arguments, with shapes instead of tensors. Only matrix products are counted.
    """
    register_flop_formula(operator.overloadpacket)(lambda *arguments, out_shape=None: formula(*arguments))


def gradients_in_outputs(name: str, first: int) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:
    """Return setup_context and backward of an operator that computes its gradients with the loss.

    name: the public operation, for errors. first: the outputs from here on are the gradients of the first inputs.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.arguments, ctx.dtype = len(inputs), inputs[0].dtype
        ctx.save_for_backward(*output[first:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * ctx.arguments
        gradients = scale_gradients(ctx, ctx.saved_tensors, grad_loss, name, ctx.dtype)
        return *gradients, *[None] * (ctx.arguments - len(gradients))

    return setup_context, backward


def split_alpha(alpha: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """Return alpha as the arguments `Tensor? alpha, float alpha_value` of a schema.

    While compiling it becomes a tensor on the device of `like`: a program would be compiled for every new number.
    """
    if isinstance(alpha, Tensor):
        return alpha.detach(), 0.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is of type {type(alpha).__name__}; it must be a float in [0, 1] or a tensor")
    if not is_compiling():
        return None, float(alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    return torch.full((), alpha, dtype=compute_dtype(like), device=like.device), 0.0


def options_arguments(options: tuple) -> tuple:
    """Return the arguments of `LossOptions` as those of OPTIONS_SCHEMA."""
    divergence, label_smoothing, *rest = options
    return divergence, float(label_smoothing), *rest


def refuse_functorch(name: str) -> None:
    """Raise RuntimeError inside a torch.func transform."""
    if not is_compiling() and functorch_stack() is not None:
        raise RuntimeError(f"{name} does not support torch.func transforms; use torch.autograd")
