"""Losses whose gradients are computed with them: how one becomes part of PyTorch's graph."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .backends import in_place_scaling

is_compiling = torch.compiler.is_compiling
_modes, functorch_stack = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, torch.nn.Parameter, float, type(None))

# Whether the running backward pass keeps its graph; a torch without it is taken to.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def needs_operator(*tensors) -> bool:
    """Whether a tensor has no memory to take the address of: while compiling, fake, functional, wrapped by a mode."""
    if is_compiling() or _modes() or functorch_stack() is not None:
        return True
    for x in tensors:
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return True
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes the factors of a product with x, where it is on; None: leave them as they are."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor):
    """A context in which products on x's device are as written. Where autocast is off already, nothing is entered."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class _Attach(torch.autograd.Function):
    """Makes a loss that is already there a function of its inputs, with the gradients that are already there."""

    @staticmethod
    def forward(ctx, name, loss, gradients, *inputs):
        ctx.name = name
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        return loss[0]

    @staticmethod
    def backward(ctx, grad_loss):
        gradients = [None] * len(ctx.saved_tensors)
        if grad_loss is not None:
            gradients = all_times(ctx, ctx.saved_tensors, grad_loss, ctx.name)
        return None, None, None, *gradients


def attach(name: str, loss: Tensor, gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> Tensor:
    """`loss` (), a function of `inputs` whose gradients are `gradients` (None: not wanted). `name`: the operation's."""
    return _Attach.apply(name, (loss,), gradients, *inputs)


def all_times(node, gradients, grad_loss: Tensor, name: str) -> list[Tensor | None]:
    """`gradients` (None: not wanted) times the incoming gradient, in a backward pass of `node`."""
    if torch.is_grad_enabled():  # create_graph=True
        return [None if x is None else first_derivative(node, x, grad_loss, name) for x in gradients]
    return [x if x is None or not x.numel() else times(x, grad_loss) for x in gradients]


def times(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """(..., C) gradient times the incoming gradient, () or (...), which is 1 for `loss.backward()`: then no second pass
    is made.

    On a GPU nobody may wait to see whether it is 1. The kernel looks, and leaves at once; in place, unless the graph is
    kept for another backward pass.
    """
    if _modes():  # tensors without values, as in tracing
        return scaled(gradient, grad_loss)
    if grad_loss.is_cpu:
        return gradient if grad_loss.dim() == 0 and grad_loss.item() == 1.0 else scaled(gradient, grad_loss)
    in_place = None if keeps_graph() or not gradient.is_contiguous() else in_place_scaling(gradient)
    if in_place is None:
        return scaled(gradient, grad_loss)
    rows = gradient if gradient.dim() == 2 else gradient.view(-1, gradient.shape[-1])
    in_place(rows, grad_loss.reshape(-1) if grad_loss.dim() else grad_loss)
    return gradient


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """(..., C) gradient times the incoming gradient, () or (...); computed in float32, in the gradient's dtype."""
    weight = grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss
    return (gradient * weight).to(gradient.dtype)


class _OnceDifferentiable(torch.autograd.Function):
    """The first derivative as part of a graph: its own derivative is refused by name."""

    @staticmethod
    def forward(ctx, gradient, grad_loss, name, *leaves):
        ctx.name = name
        return scaled(gradient, grad_loss)

    @staticmethod
    def backward(ctx, _):
        how = "by a backward pass through a gradient taken with create_graph=True"
        raise RuntimeError(f"{ctx.name} {_NO_SECOND} {how}")


_NO_SECOND = "has no second derivative: it was asked for"


def first_derivative(node, gradient: Tensor, grad_loss: Tensor, name: str) -> Tensor:
    """`scaled` for a backward pass of `node` that records a graph: a penalty on it is refused, never a constant."""
    if functorch_stack() is not None:
        if len(torch._C._functorch.get_interpreter_stack()) > 1:
            raise RuntimeError(f"{name} {_NO_SECOND} by nested torch.func transforms")
        return scaled(gradient, grad_loss)
    if _modes():  # tracing: no pass through its result can follow
        return scaled(gradient, grad_loss)
    # The result hangs on every leaf the inputs come from, so that no way to differentiate it goes past the refusal.
    return _OnceDifferentiable.apply(gradient, grad_loss, name, *_leaves(node))


def _leaves(node) -> list[Tensor]:
    found, seen, ahead = [], set(), [node]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead.extend(following for following, _ in node.next_functions)
    return found
