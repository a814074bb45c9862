"""Update many optimizers in one call: PyTorch's fused Adam, AdamW and SGD on a CPU, where their settings agree.

PyTorch's own `step` of an optimizer with six tensors takes longer around its kernel than in it, and 16 stages have 16
of them. The call is the one that `step` makes, with the tensors of all optimizers, so the bits are the same. States
stay in their optimizers. Whatever is not ordinary takes the optimizer's own `step`: the first update, which makes the
state, hooks, a `GradScaler`, other devices, subclasses, a learning rate that is a tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks_of_all
from torch.optim.adam import adam
from torch.optim.sgd import sgd

Optimizers = Sequence[Optimizer | None]
Settings = tuple[Any, ...]
ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
SGD_SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# Class of an optimizer -> the settings that must agree. A set of parameters with other keys takes its own `step`.
NAMES: dict[type, tuple[str, ...]] = {Adam: ADAM, AdamW: ADAM, SGD: SGD_SETTINGS}


def clear_gradients(optimizers: Optimizers) -> None:
    """Set the gradients that the optimizers own to None."""
    for optimizer in optimizers:
        if optimizer is None:
            continue
        if type(optimizer) in NAMES and "zero_grad" not in vars(optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            optimizer.zero_grad(set_to_none=True)


def update(optimizers: Optimizers) -> None:
    """Do what `step` of every optimizer that is not None does, in as few calls as their settings allow."""
    calls: dict[Settings, list[list[Tensor]]] = {}
    seen: set[int] = set()
    for optimizer in optimizers:
        if optimizer is None:
            continue
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not seen.isdisjoint(owned):  # a tied parameter: one update after the other
            _run(calls)
            calls, seen = {}, set()
        if _is_ordinary(optimizer) and (parts := _parts(optimizer)) is not None:
            seen |= owned
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn of updates that were skipped
            for settings, tensors in parts:
                for listed, new in zip(calls.setdefault(settings, [[] for _ in tensors]), tensors, strict=True):
                    listed += new
        else:
            optimizer.step()
    _run(calls)


def run_together(optimizers: Optimizers) -> bool:
    """Return whether `update` runs all these optimizers in shared calls, whatever order their gradients came in."""
    given = [optimizer for optimizer in optimizers if optimizer is not None]
    owned = [id(parameter) for optimizer in given for group in optimizer.param_groups for parameter in group["params"]]
    return len(given) > 1 and all(map(_is_ordinary, given)) and len(set(owned)) == len(owned)


def _is_ordinary(optimizer: Optimizer) -> bool:
    """Return whether `step` of the optimizer is PyTorch's fused one, and nothing else happens in it."""
    kind, own = type(optimizer), vars(optimizer)
    if kind not in NAMES or torch.compiler.is_compiling():
        return False
    scheduled = getattr(own.get("step", kind.step), "__wrapped__", None)  # schedulers wrap the method of the class
    hooks = [own.get(f"_optimizer_step_{when}_hooks", True) for when in ("pre", "post")]
    hooks += [getattr(hooks_of_all, f"_global_optimizer_{when}_hooks", True) for when in ("pre", "post")]
    if any(hooks) or ("step" in own and scheduled is not kind.step) or "grad_scale" in own or "found_inf" in own:
        return False
    return all(g["fused"] and not g.get("capturable") and isinstance(g["lr"], float) for g in optimizer.param_groups)


def _parts(optimizer: Optimizer) -> list[tuple[Settings, list[list[Tensor]]]] | None:
    """Return the settings of each group and its lists of tensors; None if the optimizer must take its own `step`."""
    names, parts = NAMES[type(optimizer)], []
    for group in optimizer.param_groups:
        keys = ("momentum_buffer",) * bool(group["momentum"]) if names is SGD_SETTINGS else MOMENTS
        keys += ("max_exp_avg_sq",) * bool(group.get("amsgrad"))
        tensors: list[list[Tensor]] = [[] for _ in range(2 + len(keys))]
        for parameter in group["params"]:
            gradient, state = parameter.grad, optimizer.state.get(parameter, {})
            if gradient is None:
                continue
            values = [parameter, gradient, *(state.get(key) for key in keys)]
            if type(gradient) is not Tensor or gradient.layout is not torch.strided or not gradient.is_cpu:
                return None
            if any(value is None for value in values):
                return None
            for listed, value in zip(tensors, values, strict=True):
                listed.append(value)
        parts.append(((names, *(group[name] for name in names)), tensors))
    return parts


@torch.no_grad()
def _run(calls: dict[Settings, list[list[Tensor]]]) -> None:
    for (names, *values), (parameters, gradients, *state) in calls.items():
        if not parameters:
            continue
        settings = dict(zip(names, values, strict=True))
        if names is SGD_SETTINGS:
            buffers: list[Any] = state[0] if state else []
            sgd(parameters, gradients, buffers, has_sparse_grad=False, fused=True, **settings)
        else:
            beta1, beta2 = settings.pop("betas")
            averages, squares, steps, *largest = state
            adam(
                parameters, gradients, averages, squares, largest[0] if largest else [], steps, fused=True,
                beta1=beta1, beta2=beta2, **settings,
            )  # fmt: skip
