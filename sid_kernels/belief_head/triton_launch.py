"""The Triton belief head for few classes: logits, local loss and gradients in one launch, the logits never written.

Importing this file never needs triton or a GPU. Nothing here synchronises or reads a value back, so a pass can be
captured in a graph. It knows no autograd: the caller makes the weight's gradient from dlogits.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.triton import INTERPRETING, on_device
from ..local_loss import triton_launch as local_loss
from .problem import HeadPass, HeadProblem


class Plan(NamedTuple):
    """How rows of up to `classes` classes are mapped to programs."""

    classes: int  # the largest C the plan is for; a row is held whole, in the power of two C fits in
    rows: int  # rows a program: all of them share the weight's chunk
    units: int  # hidden units at a time
    warps: int
    prefetch: int  # chunks of hidden units on their way at once, the one at work among them


# A program reads the whole weight, from the second-level cache after the first: with 32 rows, as much as their hidden
# units at C = 32. Beyond 64 classes only 16 rows stay in registers. 64 units of 16 bits are a cache line of 128 bytes.
# By compiling (tests/test_triton_aot.py) and arithmetic, none of it by timing: no GPU was at hand.
PLANS_NVIDIA = (
    Plan(32, 32, 64, 4, 3),
    Plan(64, 32, 64, 8, 3),
    Plan(128, 16, 32, 8, 3),
    Plan(256, 16, 16, 8, 2),
)
PLANS_AMD = (
    Plan(32, 32, 64, 4, 2),
    Plan(64, 32, 32, 8, 2),
    Plan(128, 16, 32, 8, 2),
    Plan(256, 16, 32, 8, 2),
)
MAX_CLASSES = 256
REGISTERS = 255  # a thread's limit on NVIDIA, and the machine's: ptxas else spills 8 bytes to fit one more block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_for(classes: int, nvidia: bool = torch.version.hip is None) -> Plan:
    return next(plan for plan in (PLANS_NVIDIA if nvidia else PLANS_AMD) if classes <= plan.classes)


def constants(plan: Plan, classes: int, units: int) -> dict[str, int]:
    """What a compiled kernel is made for, beside flags and dtypes."""
    return {
        "CLASSES": classes,
        "UNITS": units,
        "ROWS": plan.rows,
        "BLOCK_C": max(16, 1 << (classes - 1).bit_length()),
        "BLOCK_H": plan.units,
        "COUNT_BLOCK": local_loss.COUNT_BLOCK,
    }


def launch_options(plan: Plan, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    return {"num_warps": plan.warps, "num_stages": plan.prefetch} | ({"maxnreg": REGISTERS} if nvidia else {})


def fits(classes: int, units: int, dtype: torch.dtype) -> bool:
    """Whether `run` takes a head of C classes over H units: few classes, and the weight within 32-bit offsets."""
    return 1 <= classes <= MAX_CLASSES and units >= 1 and classes * units < 2**31 and dtype in DTYPES


def takes(problem: HeadProblem) -> bool:
    """Whether `run` takes this problem; a prior that is another head it does not."""
    if not (problem.hidden.is_cuda or INTERPRETING) or isinstance(problem.prior, tuple):
        return False
    return fits(problem.weight.shape[0], problem.hidden.shape[1], problem.hidden.dtype)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def run(problem: HeadProblem) -> HeadPass:
    """One launch for a head that `fits`, and one before it that counts labels where rows are many."""
    hidden, weight, bias, prior, labels = problem.hidden, problem.weight, problem.bias, problem.prior, problem.labels
    (rows, units), classes, device = hidden.shape, weight.shape[0], hidden.device
    hard, mean = labels is not None, problem.reduction == "mean"

    def empty(wanted: bool, columns: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(rows, columns, device=device, dtype=dtype) if wanted else None

    losses = torch.empty(3, rows, device=device, dtype=torch.float32)
    belief = empty(problem.need_belief, classes, (hidden if prior is None else prior).dtype)
    dlogits = empty(problem.need_grad, classes, hidden.dtype)
    dhidden = empty(problem.need_hidden_grad, units, hidden.dtype)
    if rows:
        plan, target = plan_for(classes), labels if hard else problem.soft
        given = isinstance(problem.alpha, Tensor)

        def pointer(x: Tensor | None, like: Tensor = hidden) -> Tensor:  # what is not read or written: any of the type
            return like if x is None else x

        with on_device(device):
            counted, scan_rows = local_loss.count(labels if mean else None, target, problem.ignore_index)
            _kernels().head_tile[(-(-rows // plan.rows),)](
                hidden,
                weight.contiguous(),
                pointer(bias),
                pointer(prior),
                target,
                problem.alpha if given else losses,
                counted,
                losses,
                pointer(belief, pointer(prior)),
                pointer(dlogits),
                pointer(dhidden),
                hidden.stride(0),
                0 if prior is None else prior.stride(0),
                0 if hard else target.stride(0),
                problem.alpha.dim() if given else -1,
                rows,
                scan_rows,
                problem.ignore_index,
                0.0 if given else float(problem.alpha),
                float(problem.label_smoothing),
                1.0 / classes,
                math.log(classes),
                1.0 / rows if mean else 1.0,
                HAS_BIAS=bias is not None,
                HAS_PRIOR=prior is not None,
                HARD=hard,
                REVERSE=problem.reverse,
                NEED_BELIEF=problem.need_belief,
                NEED_GRAD=problem.need_grad,
                NEED_HIDDEN_GRAD=problem.need_hidden_grad,
                **constants(plan, classes, units),
                **launch_options(plan),
            )
    return HeadPass(losses, belief, dlogits, dhidden)
