"""The local loss of DTensors: rows sharded, classes sharded (a vocabulary-parallel head), replicated, or a mixture.

Rows are computed where they are, by the usual backends. Sharded classes are computed by the reference, whose sums over
classes are completed across processes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.autograd import scaled
from ..core.options import HALF, compute_dtype, make_options
from . import reference
from .dispatch import run
from .problem import LocalLossProblem, make_problem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(*values: object) -> bool:
    """Return whether a value is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in values)


def check_sharded(name: str, x: object, others: Mapping[str, object]) -> None:
    """Raise TypeError if `x` is a plain tensor beside DTensors, or the other way around."""
    for other, value in others.items():
        if isinstance(value, Tensor) and value.dim() and is_sharded(value) != is_sharded(x):
            sharded_name, plain_name = (other, name) if is_sharded(value) else (name, other)
            sharded: Any = value if is_sharded(value) else x
            raise TypeError(
                f"{sharded_name} is a DTensor with placements {tuple(sharded.placements)} and {plain_name} is a plain"
                " tensor; both must be DTensors of one mesh. Under fully_shard, weights are plain inside a module's"
                " forward or after module.unshard()"
            )


def call_sharded(
    logits: Tensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, options: tuple, backend: str
) -> tuple[Tensor, ...]:
    """Return (loss, belief, fidelity, consistency, dlogits) as DTensors; the first is differentiable in logits.

    Raises:
        TypeError: a plain tensor beside DTensors.
    """
    check_sharded("logits", logits, {"prior": prior, "target": target, "alpha": alpha})
    return _Sharded.apply(logits, prior, target, alpha, make_options(*options), backend)


class _Layout(NamedTuple):
    """Where rows and classes of a DTensor (..., C) are."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    rows: tuple[Placement, ...]  # of a tensor (...)
    over_rows: tuple[int, ...]  # mesh dimensions that shard rows
    over_classes: tuple[int, ...]

    def reduce(self, x: Tensor, dims: tuple[int, ...], op: Any = None) -> Tensor:
        """Return x reduced across processes along mesh dimensions, by default summed."""
        x = x.contiguous()
        for dim in dims:
            torch.distributed.all_reduce(x, op or torch.distributed.ReduceOp.SUM, group=self.mesh.get_group(dim))
        return x

    def local(self, x: Any, placements: tuple[Placement, ...]) -> Any:
        """Return this process's part of a DTensor, or anything else as it is."""
        return x.redistribute(self.mesh, placements).to_local() if is_sharded(x) else x

    def from_local(self, x: Tensor, placements: tuple[Placement, ...], shape: torch.Size) -> Tensor:
        """Return the DTensor of `shape` whose local part is x."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=shape, stride=stride)


def _layout(logits: DTensor) -> _Layout:
    from torch.distributed.tensor import Replicate, Shard

    last = logits.dim() - 1
    shards = [p.dim % logits.dim() if isinstance(p, Shard) else None for p in logits.placements]
    placements = tuple(Replicate() if dim is None else Shard(dim) for dim in shards)
    rows = tuple(Replicate() if dim in (None, last) else Shard(dim) for dim in shards)
    over_rows = tuple(i for i, dim in enumerate(shards) if dim not in (None, last))
    return _Layout(
        logits.device_mesh, placements, rows, over_rows, tuple(i for i, dim in enumerate(shards) if dim == last)
    )


class _Sharded(torch.autograd.Function):
    """The local loss of DTensors, and its first derivative."""

    @staticmethod
    def forward(
        ctx: Any, logits: DTensor, prior: Tensor | None, target: Tensor, alpha: float | Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        options, backend = rest
        layout, shape = _layout(logits), logits.shape
        z = layout.local(logits, layout.placements)
        q = layout.local(prior, layout.placements)
        y = layout.local(target, layout.placements if target.is_floating_point() else layout.rows)
        by_row = isinstance(alpha, Tensor) and alpha.dim() > 0
        replicated = layout.rows if by_row else replicated_like(layout)
        problem = make_problem(z, q, y, layout.local(alpha, replicated), dataclasses.replace(options, reduction="none"))
        if z.dtype in HALF:  # rounded in backward, once
            problem = problem._replace(out=torch.empty(problem.logits.shape, dtype=torch.float32, device=z.device))
        outputs = reference.run(problem, _classes(layout, logits)) if layout.over_classes else run(problem, backend)
        losses, dlogits = [outputs.loss, outputs.fidelity, outputs.consistency], outputs.dlogits
        assert dlogits is not None and outputs.belief is not None
        if options.reduction == "none":
            values = [layout.from_local(x.view(z.shape[:-1]), layout.rows, shape[:-1]) for x in losses]
        else:
            sums = layout.reduce(torch.stack([x.sum() for x in losses]), layout.over_rows)
            if options.reduction == "mean":
                scale = 1.0 / _count(problem, layout, shape)
                sums, dlogits = sums * scale, dlogits * scale
            values = [layout.from_local(x, replicated_like(layout), torch.Size()) for x in sums.clone().unbind()]
        ctx.layout, ctx.dtype, ctx.shape, ctx.unreduced = layout, logits.dtype, shape, options.reduction == "none"
        ctx.save_for_backward(dlogits.view(z.shape))
        gradient = layout.from_local(dlogits.view(z.shape).to(z.dtype), layout.placements, shape)
        belief = layout.from_local(outputs.belief.view(z.shape), layout.placements, shape)
        ctx.mark_non_differentiable(belief, *values[1:], gradient)
        return values[0], belief, values[1], values[2], gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: object) -> tuple:
        layout: _Layout = ctx.layout
        (dlogits,) = ctx.saved_tensors
        incoming = layout.local(grad_loss, layout.rows if ctx.unreduced else replicated_like(layout))
        gradient = scaled(dlogits, incoming).to(ctx.dtype)
        return layout.from_local(gradient, layout.placements, ctx.shape), *[None] * 5


def replicated_like(layout: _Layout) -> tuple[Placement, ...]:
    """Return the placements of a tensor that every process of the mesh has."""
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * len(layout.rows)


def _classes(layout: _Layout, logits: DTensor) -> reference.Classes:
    """Return the classes of this process, with sums over those of all."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(logits.shape, layout.mesh, layout.placements)

    def total(x: Tensor) -> Tensor:
        return layout.reduce(x.sum(-1), layout.over_classes)

    def log_softmax(z: Tensor) -> Tensor:
        low = torch.full_like(z[:, :1], -torch.inf)  # a process may have no class
        top = layout.reduce(torch.cat((z, low), 1).amax(-1), layout.over_classes, torch.distributed.ReduceOp.MAX)
        t = z - torch.where(top == -torch.inf, 0.0, top)[:, None]
        return t - total(t.exp()).log()[:, None]

    return reference.Classes(logits.shape[-1], offset[-1], total, log_softmax)


def _count(problem: LocalLossProblem, layout: _Layout, shape: torch.Size) -> Tensor:
    """Return the number of rows of all processes that a mean divides by, at least 1."""
    labels, compute = problem.spec.labels, compute_dtype(problem.logits)
    if labels is None:
        return torch.tensor(max(shape[:-1].numel(), 1), dtype=compute, device=problem.logits.device)
    counted = (labels != problem.spec.options.ignore_index).sum()
    return layout.reduce(counted, layout.over_rows).clamp(min=1).to(compute)
