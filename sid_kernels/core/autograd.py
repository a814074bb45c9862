"""Make a loss whose gradients were computed with it part of PyTorch's autograd graph."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import in_place_scaling

is_compiling = torch.compiler.is_dynamo_compiling  # tracing after Dynamo runs in a dispatch mode
_modes, functorch_stack = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_function_modes = torch._C._len_torch_function_stack
tracing = torch._C._is_tracing  # by torch.jit.trace
_PLAIN = (Tensor, torch.nn.Parameter, float, type(None))
_NO_SECOND = "has no second derivative: it was asked for"

# Whether the running backward pass keeps its graph. Older PyTorch cannot tell; assume it does.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _pre_dispatch() -> bool:
    """Return whether `make_fx(pre_dispatch=True)` records operators."""
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)


def needs_operator(*values: object) -> bool:
    """Return whether the operator must be called, since a kernel called with addresses would miss something.

    That is so while compiling, while `torch.jit.trace` records, in forward-mode differentiation, in a torch.func
    transform or a mode, and for tensors that are fake or wrapped.
    """
    if is_compiling() or _modes() or functorch_stack() is not None:
        return True
    if forward_ad._current_level >= 0 or tracing() or (_function_modes() and _pre_dispatch()):
        return True
    for x in values:
        if type(x) not in _PLAIN and hasattr(type(x), "__torch_function__"):
            return True
    return False


def overrides(*values: object) -> tuple[object, ...]:
    """Return the values that are no tensors but handle calls themselves, like those of `torch.fx.symbolic_trace`."""
    if is_compiling():
        return ()
    return tuple(x for x in values if not isinstance(x, Tensor) and hasattr(type(x), "__torch_function__"))


def forward_mode() -> bool:
    """Return whether forward-mode differentiation (dual numbers) is active."""
    return forward_ad._current_level >= 0


def transforms() -> list[Any]:
    """Return the active torch.func transforms, the outermost first."""
    return torch._C._functorch.get_interpreter_stack() or []


def transforming() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active, outside of torch.compile."""
    return not is_compiling() and (functorch_stack() is not None or forward_mode())


def batched(grad_loss: Tensor) -> bool:
    """Return whether an incoming gradient is a batch of them, as with `is_grads_batched=True`."""
    return functorch_stack() is not None or _legacy_batched(grad_loss)


def wants_grad(*inputs: object) -> bool:
    """Return whether autograd records operations and an input requires a gradient."""
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def records_grad(*inputs: object) -> bool:
    """Return `wants_grad` for a call of an operator, or True while `torch.jit.trace` records it.

    A traced program may run with or without gradients.
    """
    return (not is_compiling() and tracing()) or wants_grad(*inputs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast runs products with x, or None if it leaves them as they are."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast on the device of x."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """Return `function.apply` without its search for functorch transforms, which takes a fifth of a small call.

    Under functorch, operations call their operator instead. `function` must have no setup_context.
    """
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)


class _Attach(torch.autograd.Function):
    """Attach computed gradients to a computed loss."""

    @staticmethod
    def forward(
        ctx: Any, name: str, loss: tuple[Tensor], gradients: Sequence[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.name, ctx.inputs = name, len(gradients)
        ctx.dtype = next(x.dtype for x in inputs if x is not None)
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        return loss[0]  # it came in a tuple, because an input returned as it is would become a view

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return (None,) * (3 + ctx.inputs)
        return None, None, None, *scale_gradients(ctx, ctx.saved_tensors, grad_loss, ctx.name, ctx.dtype)


_attach = apply_of(_Attach)


def attach(name: str, loss: Tensor, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Tensor:
    """Return `loss` as a differentiable function of `inputs` with `gradients`; a gradient of None is not needed.

    name: the public operation, for errors. gradients: those of the sum of the losses, shaped like the inputs; in
    float32 for inputs in half precision, so that they are rounded once.
    """
    return _attach(name, (loss,), gradients, *inputs)


def scale_gradients(
    node: Any, gradients: Sequence[Tensor | None], grad_loss: Tensor, name: str, dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """Return `gradients` times the incoming gradient, in `dtype`, in the backward pass of `node`; None stays None."""
    if torch.is_grad_enabled():  # create_graph=True
        return [None if x is None else first_derivative(node, x, grad_loss, name).to(dtype) for x in gradients]
    return [x if x is None or not x.numel() else scale_gradient(x, grad_loss, dtype) for x in gradients]


def scale_gradient(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return gradient (..., C) times the incoming gradient, () or (...), which is 1 for `loss.backward()`.

    dtype: of the result; None: the gradient's.

    A factor of 1 needs no second pass. On a GPU the kernel finds out, since reading the value here would synchronize.
    It works in place, unless the graph is kept for another backward pass: a hook may change what is returned.
    """
    if _modes():  # tensors without values, as in tracing
        return scaled(gradient, grad_loss).to(dtype or gradient.dtype)
    on_cpu = grad_loss.is_cpu
    if on_cpu and _is_one(grad_loss):
        if dtype is not None and gradient.dtype is not dtype:
            return gradient.to(dtype)
        return gradient.clone() if keeps_graph() else gradient
    if dtype is not None and gradient.dtype is not dtype:
        if batched(grad_loss):
            return scaled(gradient, grad_loss).to(dtype)
        weight = grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss
        return torch.mul(gradient, weight, out=torch.empty_like(gradient, dtype=dtype))  # no copy in float32
    if on_cpu or batched(grad_loss):
        return scaled(gradient, grad_loss)
    scale_ = None if keeps_graph() or not gradient.is_contiguous() else in_place_scaling(gradient)
    if scale_ is None:
        return scaled(gradient, grad_loss)
    rows = gradient if gradient.dim() == 2 else gradient.view(-1, gradient.shape[-1])
    scale_(rows, grad_loss.reshape(-1) if grad_loss.dim() else grad_loss)
    return gradient


def _is_one(grad_loss: Tensor) -> bool:
    """Return whether an incoming gradient on a CPU is the number 1."""
    if grad_loss.dim():
        return False
    try:
        return grad_loss.item() == 1.0
    except RuntimeError:  # a batch of numbers; checking for that first would take longer
        return False


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """Return a new tensor: gradient (..., C) times grad_loss, () or (...), computed in float32, in gradient's dtype."""
    weight = grad_loss.unsqueeze(-1) if grad_loss.dim() else grad_loss
    return (gradient * weight).to(gradient.dtype)


class _OnceDifferentiable(torch.autograd.Function):
    """The first derivative as part of a graph; its own derivative raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad_loss: Tensor, name: str, *leaves: Tensor) -> Tensor:
        ctx.name = name
        return scaled(gradient, grad_loss)

    @staticmethod
    def backward(ctx: Any, *_: object) -> None:
        how = "by a backward pass through a gradient taken with create_graph=True"
        raise RuntimeError(f"{ctx.name} {_NO_SECOND} {how}")


def once_differentiable(node: Any, gradient: Tensor, name: str) -> Tensor:
    """Return a gradient that includes the incoming one as part of a graph; see `first_derivative`."""
    return first_derivative(node, gradient, torch.ones((), device=gradient.device), name)


def first_derivative(node: Any, gradient: Tensor, grad_loss: Tensor, name: str) -> Tensor:
    """Return `scaled` for a backward pass of `node` that records a graph, in which a second derivative raises."""
    if functorch_stack() is not None:
        if len(torch._C._functorch.get_interpreter_stack()) > 1:
            raise RuntimeError(f"{name} {_NO_SECOND} by nested torch.func transforms")
        return scaled(gradient, grad_loss)
    if _modes():  # tracing: no pass through its result can follow
        return scaled(gradient, grad_loss)
    # The result depends on every leaf of the inputs, so that differentiating it always reaches the error.
    return _OnceDifferentiable.apply(gradient, grad_loss, name, *_leaves(node))


def _leaves(node: Any) -> list[Tensor]:
    """Return the leaf tensors that the graph of `node` reaches."""
    leaves, visited, pending = [], set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        pending.extend(following for following, _ in node.next_functions)
    return leaves
