"""The Triton cascade: one matrix product for the features' part of every stage, then one launch for all stages.

Importing this file never needs triton or a GPU. Nothing here synchronises or reads a value back, so a pass can be
captured in a graph. It knows no autograd: the caller makes the weights' gradients from what a pass returns.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.triton import INTERPRETING, on_device
from ..local_loss import triton_launch as local_loss
from .problem import CascadePass, CascadeProblem


class Plan(NamedTuple):
    """How a tile of rows of up to `classes` classes goes through the stages."""

    classes: int  # the largest C the plan is for; a row is held whole, in the power of two C fits in
    rows: int  # rows a program
    units: int  # hidden units at a time
    warps: int
    prefetch: int  # chunks of hidden units on their way at once, the one at work among them


# 16 rows are the least that fill a tensor core's tile, so a batch of 128 spreads over 8 programs; with 256 classes only
# half of them stay in registers. As many hidden units at once as do not spill, for the chunks of a stage run one after
# another. float32 products run on the ordinary cores, whose operands are registers: fewer units. AMD holds masks in
# scalar registers, the first to run out. By compiling (tests/test_triton_aot.py), none by timing: no GPU was at hand.
PLANS = {  # by maker and by whether elements have 16 bits
    ("nvidia", True): (
        Plan(32, 16, 64, 4, 2),
        Plan(64, 16, 64, 8, 2),
        Plan(128, 16, 32, 8, 2),
        Plan(256, 8, 16, 8, 2),
    ),
    ("nvidia", False): (
        Plan(32, 16, 64, 4, 2),
        Plan(64, 16, 64, 8, 2),
        Plan(128, 16, 16, 8, 2),
        Plan(256, 8, 16, 8, 2),
    ),
    ("amd", True): (
        Plan(32, 16, 32, 4, 2),
        Plan(64, 16, 32, 8, 2),
        Plan(128, 16, 16, 8, 1),
        Plan(256, 16, 16, 8, 1),
    ),
    ("amd", False): (
        Plan(32, 16, 32, 4, 2),
        Plan(64, 16, 32, 8, 2),
        Plan(128, 16, 16, 8, 1),
        Plan(256, 16, 16, 4, 1),
    ),
}
MAX_CLASSES = 256
REGISTERS = 255  # a thread's limit on NVIDIA, and the machine's: ptxas else spills 8 bytes to fit one more block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_for(classes: int, half: bool, nvidia: bool = torch.version.hip is None) -> Plan:
    return next(plan for plan in PLANS["nvidia" if nvidia else "amd", half] if classes <= plan.classes)


def constants(plan: Plan, classes: int, units: int, features: int) -> dict[str, int]:
    """What a compiled kernel is made for, beside flags and dtypes."""
    return {
        "CLASSES": classes,
        "UNITS": units,
        "INPUTS": classes + features,
        "ROWS": plan.rows,
        "BLOCK_C": max(16, 1 << (classes - 1).bit_length()),
        "BLOCK_H": plan.units,
        "COUNT_BLOCK": local_loss.COUNT_BLOCK,
    }


def launch_options(plan: Plan, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    return {"num_warps": plan.warps, "num_stages": plan.prefetch} | ({"maxnreg": REGISTERS} if nvidia else {})


def fits(classes: int, units: int, features: int, stages: int, dtype: torch.dtype) -> bool:
    """Whether `run` takes C classes, H units, D features and L stages: one stage and one tile within 32-bit offsets."""
    small = max(units * (classes + features), 16 * stages * units) < 2**31
    return 1 <= classes <= MAX_CLASSES and units >= 1 and features >= 1 and small and dtype in DTYPES


def takes(problem: CascadeProblem) -> bool:
    if not (problem.features.is_cuda or INTERPRETING):
        return False
    stages, units, classes = problem.weights.sizes
    return fits(classes, units, problem.features.shape[1], stages, problem.features.dtype)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def run(problem: CascadeProblem) -> CascadePass:
    """All stages of a cascade that `fits`. hidden and dhidden come as (L, B, H) views of (B, L, H)."""
    done = run_rows(problem)
    return done._replace(losses=done.losses.sum(-1))


def run_rows(problem: CascadeProblem) -> CascadePass:
    """The same, its losses (3, L, B): each row's share of the reduced value."""
    features, weights, labels = problem.features, problem.weights, problem.labels
    stages, units, inputs = weights.hidden_weight.shape
    rows, classes = features.shape[0], inputs - features.shape[1]
    device, dtype = features.device, weights.hidden_weight.dtype
    hard, mean, need_grad = labels is not None, problem.reduction == "mean", problem.need_grad

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    # The features' columns of all stages' weights are one matrix (L H, D), its rows C + D apart.
    on_features = weights.hidden_weight.view(stages * units, inputs)[:, classes:]
    pre = torch.addmm(weights.hidden_bias.view(-1), features, on_features.t())  # (B, L H)
    losses = empty(3, stages, rows, dtype=torch.float32)
    beliefs, logits = empty(stages, rows, classes), empty(rows, classes)
    hidden, dlogits = (empty(rows, stages * units), empty(stages, rows, classes)) if need_grad else (None, None)

    def by_stage(x: Tensor) -> Tensor:  # (B, L H) -> (L, B, H)
        return x.view(rows, stages, units).transpose(0, 1)

    if rows:
        plan = plan_for(classes, half=dtype is not torch.float32)
        prior, target = problem.prior, labels if hard else problem.soft
        given = isinstance(problem.alpha, Tensor)
        with on_device(device):
            counted, scan_rows = local_loss.count(labels if mean else None, target, problem.ignore_index)
            _kernels().cascade_tile[(-(-rows // plan.rows),)](
                pre,
                pre if prior is None else prior,
                target,
                problem.alpha if given else losses,
                counted,
                weights.hidden_weight,
                weights.logits_weight,
                weights.logits_bias,
                losses,
                beliefs,
                logits,
                pre if hidden is None else hidden,
                beliefs if dlogits is None else dlogits,
                0 if prior is None else prior.stride(0),
                0 if hard else target.stride(0),
                1 if given else -1,
                rows,
                stages,
                scan_rows,
                problem.ignore_index,
                0.0 if given else float(problem.alpha),
                float(problem.label_smoothing),
                1.0 / classes,
                1.0 / rows if mean else 1.0,
                HAS_PRIOR=prior is not None,
                HARD=hard,
                REVERSE=problem.reverse,
                NEED_GRAD=need_grad,
                **constants(plan, classes, units, features.shape[1]),
                **launch_options(plan),
            )
    if not need_grad:
        return CascadePass(losses, beliefs, logits, None, None, None)
    return CascadePass(losses, beliefs, logits, dlogits, by_stage(hidden), by_stage(pre))
