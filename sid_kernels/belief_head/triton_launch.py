"""The Triton belief head for few classes: logits, local loss and gradients in one launch, the logits never stored.

Importing this file needs neither triton nor a GPU. Nothing here synchronizes or reads a value back, so a pass can be
captured in a graph. The caller computes the weight's gradient from dlogits.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.triton import INTERPRETING, on_device
from ..local_loss.triton_launch import COUNT_BLOCK, count
from .problem import BeliefHeadOutputs, BeliefHeadProblem, PriorHead


class HeadPlan(NamedTuple):
    """How rows of up to `classes` classes are mapped to programs."""

    classes: int  # the largest C of the plan; a row is held whole, in the power of two that C fits in
    rows: int  # rows per program, which share the chunks of the weight
    hidden_block: int  # hidden units at a time
    warps: int
    prefetch: int  # chunks of hidden units in flight at once, including the one in use


# A program reads the whole weight, from the second-level cache after the first program. With 32 rows, that is as much
# as their hidden units at C = 32. Beyond 64 classes only 16 rows stay in registers. 64 units of 16 bits are a cache
# line of 128 bytes. All by compiling (tests/compiled/triton/test_triton_aot.py) and arithmetic, none by timing.
PLANS_NVIDIA = (
    HeadPlan(32, 32, 64, 4, 3),
    HeadPlan(64, 32, 64, 8, 3),
    HeadPlan(128, 16, 32, 8, 3),
    HeadPlan(256, 16, 16, 8, 2),
)
PLANS_AMD = (
    HeadPlan(32, 32, 64, 4, 2),
    HeadPlan(64, 32, 32, 8, 2),
    HeadPlan(128, 16, 32, 8, 2),
    HeadPlan(256, 16, 32, 8, 2),
)
MAX_CLASSES = 256
REGISTERS = 255  # per thread, the most NVIDIA has: without a limit ptxas spills 8 bytes to fit one more block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_for(classes: int, nvidia: bool = torch.version.hip is None) -> HeadPlan:
    """Return the plan for C classes."""
    return next(plan for plan in (PLANS_NVIDIA if nvidia else PLANS_AMD) if classes <= plan.classes)


def constants(plan: HeadPlan, classes: int, hidden_dim: int) -> dict[str, int]:
    """Return the constants of a compiled kernel, except flags and dtypes."""
    return {
        "CLASSES": classes,
        "HIDDEN_DIM": hidden_dim,
        "ROWS": plan.rows,
        "BLOCK_C": max(16, 1 << (classes - 1).bit_length()),
        "BLOCK_H": plan.hidden_block,
        "COUNT_BLOCK": COUNT_BLOCK,
    }


def launch_options(plan: HeadPlan, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    """Return the launch options of a plan."""
    return {"num_warps": plan.warps, "num_stages": plan.prefetch} | ({"maxnreg": REGISTERS} if nvidia else {})


def fits(classes: int, hidden_dim: int, dtype: torch.dtype) -> bool:
    """Return whether `run` takes a head of C classes over H units: few classes, and a weight within 32-bit offsets."""
    return 1 <= classes <= MAX_CLASSES and hidden_dim >= 1 and classes * hidden_dim < 2**31 and dtype in DTYPES


def takes(problem: BeliefHeadProblem) -> bool:
    """Return whether `run` takes this problem. It does not take a prior that is another head."""
    if not (problem.hidden.is_cuda or INTERPRETING) or isinstance(problem.prior, PriorHead):
        return False
    return fits(problem.weight.shape[0], problem.hidden.shape[1], problem.hidden.dtype)


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels at first use."""
    from . import triton_kernels

    return triton_kernels


def run(problem: BeliefHeadProblem) -> BeliefHeadOutputs:
    """Return losses, belief and gradients of a head that `fits`, from one launch, and one that counts many labels."""
    hidden, weight, bias, prior, spec, need_belief, need = problem
    assert not isinstance(prior, PriorHead)
    (rows, hidden_dim), classes, device = hidden.shape, weight.shape[0], hidden.device
    alpha, options, hard = spec.alpha, spec.options, spec.labels is not None

    def empty(wanted: bool, columns: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(rows, columns, device=device, dtype=dtype) if wanted else None

    losses = torch.empty(3, rows, device=device, dtype=torch.float32)
    belief = empty(need_belief, classes, (hidden if prior is None else prior).dtype)
    dlogits = empty(problem.need_grad, classes, hidden.dtype)
    dhidden = empty(need.hidden, hidden_dim, torch.float32)  # rounded when it is complete
    if rows:
        plan = plan_for(classes)

        def pointer(x: Tensor | None, like: Tensor = hidden) -> Tensor:  # an unused pointer: any tensor of the dtype
            return like if x is None else x

        with on_device(device):
            counted, scan_rows = count(spec)
            _kernels().head_tile[(-(-rows // plan.rows),)](
                hidden,
                weight.contiguous(),
                pointer(bias),
                pointer(prior),
                spec.target,
                alpha if isinstance(alpha, Tensor) else losses,
                counted,
                losses,
                pointer(belief, pointer(prior)),
                pointer(dlogits),
                pointer(dhidden),
                hidden.stride(0),
                0 if prior is None else prior.stride(0),
                0 if hard else spec.target.stride(0),
                alpha.dim() if isinstance(alpha, Tensor) else -1,
                rows,
                scan_rows,
                options.ignore_index,
                0.0 if isinstance(alpha, Tensor) else alpha,
                options.label_smoothing,
                1.0 / classes,
                math.log(classes),
                1.0 / rows if options.reduction == "mean" else 1.0,
                HAS_BIAS=bias is not None,
                HAS_PRIOR=prior is not None,
                HARD=hard,
                REVERSE=options.reverse,
                NEED_BELIEF=need_belief,
                NEED_GRAD=dlogits is not None,
                NEED_HIDDEN_GRAD=dhidden is not None,
                **constants(plan, classes, hidden_dim),
                **launch_options(plan),
            )
    return BeliefHeadOutputs(losses, belief, dlogits, dhidden)
