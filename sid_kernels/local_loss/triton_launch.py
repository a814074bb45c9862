"""The Triton backend (NVIDIA and AMD): chooses a plan from a table by size and launches the kernels of triton_rows.

Importing this file never needs triton or a GPU; `unavailable()` says why the backend cannot be used. Nothing here
synchronises or reads a value back, so every launch can be captured in a graph.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.triton import on_device
from .problem import Problem, Result, belief_memory


class Plan(NamedTuple):
    """How a row of up to `classes` logits is mapped to programs."""

    classes: int  # the largest C the plan is for
    rows: int  # rows a program
    block: int  # columns held at once; the whole row unless `looped`
    warps: int
    registers: tuple[int, int, int]  # a thread's limit on NVIDIA, with 0, 1 or 2 of: soft targets, narrow accesses
    looped: bool = False


# Whole rows: 8 to 16 elements of z and q (and y) a thread, in registers. Short rows share a program of 2048 elements,
# so (128, 10) is one program and one launch; from 129 to 512 classes one warp has a row, so its sums need no barrier.
# Loops hold 8 elements of a chunk and of the next. To 32768 classes, 64 registers: four blocks a multiprocessor. The
# rows of 4 x 132 blocks fit a 50 MB second-level cache, for the second sweep, up to 12k classes in float32 or 24k in
# 16 bits. Beyond, one block, whose row's end stays in its first-level cache.
# Register limits: about the least at which nothing spills. Without one, ptxas may spill a few bytes to fit one more
# block. All by compiling (tests/test_triton_aot.py) and arithmetic, none of it by timing: no GPU was at hand.
PLANS = (
    Plan(16, 128, 16, 8, (112, 144, 176)),
    Plan(32, 64, 32, 8, (112, 144, 176)),
    Plan(64, 32, 64, 8, (112, 144, 176)),
    Plan(128, 16, 128, 8, (112, 144, 176)),
    Plan(256, 2, 256, 1, (112, 144, 176)),
    Plan(512, 1, 512, 1, (112, 144, 176)),
    Plan(1024, 1, 1024, 2, (96, 112, 144)),
    Plan(2048, 1, 2048, 4, (96, 112, 144)),
    Plan(4096, 1, 4096, 8, (96, 112, 144)),
    Plan(8192, 1, 8192, 16, (112, 128, 128)),
    Plan(32768, 1, 2048, 8, (64, 96, 128), looped=True),
    Plan(2**62, 1, 4096, 16, (80, 112, 128), looped=True),
)

COUNT_HERE = 1024  # rows up to which every program counts the labels itself, instead of a launch of its own
COUNT_BLOCK = 256  # labels counted at a time inside a program
COUNT_GRID_BLOCK, COUNT_WARPS = 4096, 4  # labels a program when counting is a launch of its own
SUM_BLOCK, SUM_WARPS = 2048, 8


def plan_for(classes: int) -> Plan:
    return next(plan for plan in PLANS if classes <= plan.classes)


def register_limit(plan: Plan, hard: bool, wide: bool, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    """The launch option that states the limit; AMD's compiler knows no such option and needs none."""
    return {"maxnreg": plan.registers[(not hard) + (not wide)]} if nvidia else {}


@functools.cache
def _kernels() -> ModuleType:
    """The kernels; imported at first use, for importing triton takes longer than all the rest of this package."""
    from . import triton_kernels

    return triton_kernels


def run(problem: Problem) -> Result:
    """Loss, belief and gradient in one launch, plus a small one where losses of several programs are summed."""
    z = problem.logits
    rows, classes = z.shape
    device = z.device
    reduce = problem.reduction != "none"
    belief, dlogits = belief_memory(problem), None
    if problem.need_grad:
        dlogits = torch.empty(rows, classes, device=device, dtype=z.dtype) if problem.out is None else problem.out
    if rows == 0 or classes == 0:
        losses = [torch.zeros(() if reduce else (0,), device=device, dtype=torch.float32) for _ in range(3)]
        return Result(*losses, belief, dlogits)

    plan = plan_for(classes)
    programs = -(-rows // plan.rows)
    losses = [torch.empty(() if reduce else (rows,), device=device, dtype=torch.float32) for _ in range(3)]
    kernels = _kernels()
    partial = torch.empty(3, programs, device=device, dtype=torch.float32) if reduce and programs > 1 else None
    with on_device(device):
        _launch(problem, plan, programs, belief, dlogits, losses if partial is None else list(partial.unbind()))
        if partial is not None:
            kernels.sum_parts[(3,)](partial, *losses, programs, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
    return Result(*losses, belief, dlogits)


def _launch(
    problem: Problem, plan: Plan, programs: int, belief: Tensor | None, dlogits: Tensor | None, losses: list[Tensor]
) -> None:
    z, prior, labels = problem.logits, problem.prior, problem.labels
    rows, classes = z.shape
    hard, mean = labels is not None, problem.reduction == "mean"
    target = labels if hard else problem.soft
    kernels = _kernels()
    # What a launch neither reads nor writes is any pointer of one type in all calls, so nothing recompiles.
    counted, scan_rows = count(labels if mean else None, target, problem.ignore_index)
    given = isinstance(problem.alpha, Tensor)
    arrays = (z, prior, problem.soft, dlogits)
    strides = [0 if x is None else x.stride(0) for x in arrays]
    addresses = [x.data_ptr() for x in arrays if x is not None]
    kernel = kernels.local_loss_loop if plan.looped else kernels.local_loss_tile
    kernel[(programs,)](
        z,
        z if prior is None else prior,
        target,
        problem.alpha if given else losses[0],
        counted,
        z if belief is None else belief,
        z if dlogits is None else dlogits,
        *losses,
        *strides,
        problem.alpha.dim() if given else -1,
        rows,
        classes,
        scan_rows,
        problem.ignore_index,
        0.0 if given else float(problem.alpha),
        float(problem.label_smoothing),
        1.0 / classes,
        math.log(classes),
        1.0 / rows if mean else 1.0,
        HAS_PRIOR=prior is not None,
        HARD=hard,
        REVERSE=problem.reverse,
        REDUCE=problem.reduction != "none",
        NEED_GRAD=dlogits is not None,
        NEED_BELIEF=belief is not None,
        ROWS=plan.rows,
        BLOCK_C=plan.block,
        COUNT_BLOCK=COUNT_BLOCK,
        num_warps=plan.warps,
        **register_limit(plan, hard, wide=all(n % 16 == 0 for n in (classes, *strides, *addresses))),
    )


def count(labels: Tensor | None, unread: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """`counted` and `scan_rows` of gradient_scale: how a kernel learns the number of labels (N,) that count.

    Without labels it does not ask. What a launch does not read is any pointer of the same type, so nothing recompiles.
    """
    if labels is None:
        return unread, 0
    rows = labels.shape[0]
    if rows <= COUNT_HERE:
        return unread, rows
    counted = torch.zeros((), device=labels.device, dtype=torch.int64)
    _kernels().count_rows[(-(-rows // COUNT_GRID_BLOCK),)](
        labels, counted, rows, ignore_index, BLOCK=COUNT_GRID_BLOCK, num_warps=COUNT_WARPS
    )
    return counted, -1
