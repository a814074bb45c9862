"""The Triton backend (NVIDIA and AMD): chooses a plan from a table by size and launches the kernels.

Importing this file needs neither triton nor a GPU. Nothing here synchronizes or reads a value back, so every launch can
be captured in a graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.options import LossSpec
from ..core.triton import on_device
from .problem import LocalLossOutputs, LocalLossProblem, allocate, allocate_belief, scale_of_mean


class LossPlan(NamedTuple):
    """How rows of up to `classes` logits are mapped to programs."""

    classes: int  # the largest C of the plan
    rows: int  # rows per program
    block: int  # columns held at once; the whole row unless `looped`
    warps: int
    registers: tuple[int, int, int]  # limit per thread on NVIDIA, with 0, 1 or 2 of: soft targets, narrow accesses
    looped: bool = False


# Whole rows: each thread holds 8 to 16 elements of z and q (and y) in registers. Short rows share a program of 2048
# elements, so (128, 10) is one program and one launch. From 129 to 512 classes one warp has a row, so its sums need no
# barrier. Loops hold 8 elements of a chunk and of the next one. Up to 32768 classes, 64 registers let four blocks share
# a multiprocessor: the rows of 4 x 132 blocks fit a 50 MB second-level cache for the second sweep, up to 12k classes in
# float32 or 24k in 16 bits. Beyond, one block keeps the end of its row in the first-level cache.
# Register limits: about the least without spills. Without a limit, ptxas may spill a few bytes to fit one more block.
# All found by compiling (tests/compiled/triton/test_triton_aot.py) and arithmetic, none by timing.
PLANS = (
    LossPlan(16, 128, 16, 8, (112, 144, 176)),
    LossPlan(32, 64, 32, 8, (112, 144, 176)),
    LossPlan(64, 32, 64, 8, (112, 144, 176)),
    LossPlan(128, 16, 128, 8, (112, 144, 176)),
    LossPlan(256, 2, 256, 1, (112, 144, 176)),
    LossPlan(512, 1, 512, 1, (112, 144, 176)),
    LossPlan(1024, 1, 1024, 2, (96, 112, 144)),
    LossPlan(2048, 1, 2048, 4, (96, 112, 144)),
    LossPlan(4096, 1, 4096, 8, (96, 112, 144)),
    LossPlan(8192, 1, 8192, 16, (112, 128, 128)),
    LossPlan(32768, 1, 2048, 8, (64, 96, 128), looped=True),
    LossPlan(2**62, 1, 4096, 16, (80, 112, 128), looped=True),
)

COUNT_HERE = 1024  # up to this many rows, every program counts the labels itself, instead of a separate launch
COUNT_BLOCK = 256  # labels counted at a time inside a program
COUNT_GRID_BLOCK, COUNT_WARPS = 4096, 4  # labels per program of a separate launch
SUM_BLOCK, SUM_WARPS = 2048, 8
WIDE_BYTES = 16 << 20  # of a gradient in float32 before it is scaled and rounded


def plan_for(classes: int) -> LossPlan:
    """Return the plan for rows of C classes."""
    return next(plan for plan in PLANS if classes <= plan.classes)


def register_limit(plan: LossPlan, hard: bool, wide: bool, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    """Return the launch option for the register limit; AMD's compiler has no such option and needs none."""
    return {"maxnreg": plan.registers[(not hard) + (not wide)]} if nvidia else {}


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels at first use: importing triton takes longer than importing the rest of this package."""
    from . import triton_kernels

    return triton_kernels


def run(problem: LocalLossProblem) -> LocalLossOutputs:
    """Return loss, belief and gradient of a problem, from one launch, plus small ones that count labels and add losses.

    Labels are counted separately if there are many. Losses are added if several programs have a share of them.
    """
    if problem.incoming is not None:
        return _run_incoming(problem, problem.incoming)
    rows, classes = problem.logits.shape
    device = problem.logits.device
    outputs = allocate(problem)
    losses = (outputs.loss, outputs.fidelity, outputs.consistency)
    if rows == 0 or classes == 0:
        for x in losses:
            x.zero_()
        return outputs
    plan = plan_for(classes)
    programs = -(-rows // plan.rows)
    with on_device(device):
        if problem.spec.options.reduction == "none" or programs == 1:
            _launch(problem, plan, outputs, losses)
        else:
            partial = torch.empty(3, programs, device=device, dtype=torch.float32)
            _launch(problem, plan, outputs, partial.unbind())
            _kernels().sum_parts[(3,)](partial, *losses, programs, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
    return outputs


def _run_incoming(problem: LocalLossProblem, incoming: Tensor) -> LocalLossOutputs:
    """Return the outputs of a problem with an incoming gradient, which scales blocks of a float32 gradient."""
    z, prior, spec = problem.logits, problem.prior, problem.spec
    rows, classes = z.shape
    row_options = dataclasses.replace(spec.options, reduction="none")
    scale = scale_of_mean(spec, z) if spec.options.reduction == "mean" else None
    factor = incoming if scale is None else incoming * scale
    belief, dlogits = allocate_belief(problem), torch.empty_like(z) if problem.out is None else problem.out
    losses = torch.empty(3, rows, dtype=torch.float32, device=z.device)
    step = max(1, WIDE_BYTES // (4 * classes))
    wide = torch.empty(min(step, rows), classes, dtype=torch.float32, device=z.device)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        outputs = run(
            LocalLossProblem(
                z[part],
                None if prior is None else prior[part],
                spec.rows(part)._replace(options=row_options),
                need_grad=True,
                need_belief=belief is not None,
                out=wide[: part.stop - start],
                belief_out=None if belief is None else belief[part],
            )
        )
        for total, values in zip(losses, (outputs.loss, outputs.fidelity, outputs.consistency), strict=True):
            total[part] = values
        by_row = factor if factor.dim() == 0 else factor[part, None]
        torch.mul(wide[: part.stop - start], by_row, out=dlogits[part])
    if spec.options.reduction != "none":
        losses = losses.sum(1) if scale is None else losses.sum(1) * scale
    loss, fidelity, consistency = losses.unbind()
    return LocalLossOutputs(loss, belief, fidelity, consistency, dlogits)


def _launch(problem: LocalLossProblem, plan: LossPlan, outputs: LocalLossOutputs, losses: tuple[Tensor, ...]) -> None:
    """Run the kernel of `plan`; losses: loss, fidelity and consistency, of each program or row."""
    (z, prior, spec, *_), belief, dlogits = problem, outputs.belief, outputs.dlogits
    rows, classes = z.shape
    alpha, options, hard = spec.alpha, spec.options, spec.labels is not None
    # A pointer that a launch does not use gets a tensor of the same dtype in all calls, so that nothing recompiles.
    counted, scan_rows = count(spec)
    arrays = (z, prior, spec.soft, dlogits)
    strides = [0 if x is None else x.stride(0) for x in arrays]
    addresses = [x.data_ptr() for x in arrays if x is not None]
    kernel = _kernels().local_loss_loop if plan.looped else _kernels().local_loss_tile
    kernel[(-(-rows // plan.rows),)](
        z,
        z if prior is None else prior,
        spec.target,
        alpha if isinstance(alpha, Tensor) else losses[0],
        counted,
        z if belief is None else belief,
        z if dlogits is None else dlogits,
        *losses,
        *strides,
        alpha.dim() if isinstance(alpha, Tensor) else -1,
        rows,
        classes,
        scan_rows,
        options.ignore_index,
        0.0 if isinstance(alpha, Tensor) else alpha,
        options.label_smoothing,
        1.0 / classes,
        math.log(classes),
        1.0 / rows if options.reduction == "mean" else 1.0,
        HAS_PRIOR=prior is not None,
        HARD=hard,
        REVERSE=options.reverse,
        REDUCE=options.reduction != "none",
        NEED_GRAD=dlogits is not None,
        NEED_BELIEF=belief is not None,
        ROWS=plan.rows,
        BLOCK_C=plan.block,
        COUNT_BLOCK=COUNT_BLOCK,
        num_warps=plan.warps,
        **register_limit(plan, hard, wide=all(n % 16 == 0 for n in (classes, *strides, *addresses))),
    )


def count(spec: LossSpec) -> tuple[Tensor, int]:
    """Return `counted` and `scan_rows` of the kernel function `gradient_scale`: how it counts the labels of a mean.

    For up to COUNT_HERE labels it counts them itself. For more, this function launches a kernel that does.
    """
    labels = spec.labels
    if labels is None or spec.options.reduction != "mean":
        return spec.target, 0
    rows = labels.shape[0]
    if rows <= COUNT_HERE:
        return labels, rows
    counted = torch.zeros((), device=labels.device, dtype=torch.int64)
    _kernels().count_rows[(-(-rows // COUNT_GRID_BLOCK),)](
        labels, counted, rows, spec.options.ignore_index, BLOCK=COUNT_GRID_BLOCK, num_warps=COUNT_WARPS
    )
    return counted, -1
