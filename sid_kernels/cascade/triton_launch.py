"""The Triton cascade: one matrix product for the features' part of every stage, then one launch for all stages.

Importing this file needs neither triton nor a GPU. Nothing here synchronizes or reads a value back, so a pass can be
captured in a graph. The caller computes the weights' gradients from the outputs.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.triton import INTERPRETING, on_device
from ..local_loss.triton_launch import COUNT_BLOCK, count
from .problem import CascadeActivations, CascadeOutputs, CascadeProblem


class CascadePlan(NamedTuple):
    """How a tile of rows of up to `classes` classes goes through the stages."""

    classes: int  # the largest C of the plan; a row is held whole, in the power of two that C fits in
    rows: int  # rows per program
    hidden_block: int  # hidden units at a time
    warps: int
    prefetch: int  # chunks of hidden units in flight at once, including the one in use


# 16 rows are the least that fill a tensor core's tile, so a batch of 128 spreads over 8 programs. With 256 classes only
# half of them stay in registers. The chunks of a stage run one after another, so a chunk has as many hidden units as do
# not spill. float32 products run on the ordinary cores, whose operands are registers: fewer units. On AMD the scalar
# registers, which hold masks, run out first. Found by compiling (tests/compiled/triton/test_triton_aot.py), not timing.
PLANS = {  # by vendor and by whether elements have 16 bits
    ("nvidia", True): (
        CascadePlan(32, 16, 64, 4, 2),
        CascadePlan(64, 16, 64, 8, 2),
        CascadePlan(128, 16, 32, 8, 2),
        CascadePlan(256, 8, 16, 8, 2),
    ),
    ("nvidia", False): (
        CascadePlan(32, 16, 64, 4, 2),
        CascadePlan(64, 16, 64, 8, 2),
        CascadePlan(128, 16, 16, 8, 2),
        CascadePlan(256, 8, 16, 8, 2),
    ),
    ("amd", True): (
        CascadePlan(32, 16, 32, 4, 2),
        CascadePlan(64, 16, 32, 8, 2),
        CascadePlan(128, 16, 16, 8, 1),
        CascadePlan(256, 16, 16, 8, 1),
    ),
    ("amd", False): (
        CascadePlan(32, 16, 32, 4, 2),
        CascadePlan(64, 16, 32, 8, 2),
        CascadePlan(128, 16, 16, 8, 1),
        CascadePlan(256, 16, 16, 4, 1),
    ),
}
MAX_CLASSES = 256
REGISTERS = 255  # per thread, the most NVIDIA has: without a limit ptxas spills 8 bytes to fit one more block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_for(classes: int, half: bool, nvidia: bool = torch.version.hip is None) -> CascadePlan:
    """Return the plan for C classes, for weights in half precision or in float32."""
    return next(plan for plan in PLANS["nvidia" if nvidia else "amd", half] if classes <= plan.classes)


def constants(plan: CascadePlan, classes: int, hidden_dim: int, features: int) -> dict[str, int]:
    """Return the constants of a compiled kernel, except flags and dtypes."""
    return {
        "CLASSES": classes,
        "HIDDEN_DIM": hidden_dim,
        "INPUTS": classes + features,
        "ROWS": plan.rows,
        "BLOCK_C": max(16, 1 << (classes - 1).bit_length()),
        "BLOCK_H": plan.hidden_block,
        "COUNT_BLOCK": COUNT_BLOCK,
    }


def launch_options(plan: CascadePlan, nvidia: bool = torch.version.hip is None) -> dict[str, int]:
    """Return the launch options of a plan."""
    return {"num_warps": plan.warps, "num_stages": plan.prefetch} | ({"maxnreg": REGISTERS} if nvidia else {})


def fits(classes: int, hidden_dim: int, features: int, stages: int, dtype: torch.dtype) -> bool:
    """Return whether `run` takes C classes, H units, D features and L stages: a stage and a tile in 32-bit offsets."""
    small = max(hidden_dim * (classes + features), 16 * stages * hidden_dim) < 2**31
    return 1 <= classes <= MAX_CLASSES and hidden_dim >= 1 and features >= 1 and small and dtype in DTYPES


def takes(problem: CascadeProblem) -> bool:
    """Return whether `run` takes this problem."""
    if not (problem.features.is_cuda or INTERPRETING):
        return False
    stages, hidden_dim, classes = problem.weights.sizes
    return fits(classes, hidden_dim, problem.features.shape[1], stages, problem.features.dtype)


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels at first use."""
    from . import triton_kernels

    return triton_kernels


def run(problem: CascadeProblem) -> CascadeOutputs:
    """Return the outputs of a cascade that `fits`; hidden and dhidden are (L, B, H) views of (B, L, H)."""
    outputs = run_rows(problem)
    return outputs._replace(losses=outputs.losses.sum(-1))


def run_rows(problem: CascadeProblem) -> CascadeOutputs:
    """Return what `run` does, with losses (3, L, B): each row's share of the reduced value."""
    features, weights, prior, spec, need_grad = problem
    stages, hidden_dim, inputs = weights.hidden_weight.shape
    rows, classes = features.shape[0], inputs - features.shape[1]
    dtype = weights.hidden_weight.dtype
    alpha, options, hard = spec.alpha, spec.options, spec.labels is not None

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device=features.device, dtype=dtype)

    # The features' columns of all stages' weights are one matrix (L H, D) with rows C + D apart.
    feature_part = weights.hidden_weight.view(stages * hidden_dim, inputs)[:, classes:]
    pre = torch.addmm(weights.hidden_bias.view(-1), features, feature_part.t())  # (B, L H)
    losses = empty(3, stages, rows, dtype=torch.float32)
    beliefs, logits = empty(stages, rows, classes), empty(rows, classes)
    hidden, dlogits = (empty(rows, stages * hidden_dim), empty(stages, rows, classes)) if need_grad else (pre, beliefs)

    if rows:
        plan = plan_for(classes, half=dtype is not torch.float32)
        with on_device(features.device):
            counted, scan_rows = count(spec)
            _kernels().cascade_tile[(-(-rows // plan.rows),)](
                pre,
                pre if prior is None else prior,
                spec.target,
                alpha if isinstance(alpha, Tensor) else losses,
                counted,
                weights.hidden_weight,
                weights.logits_weight,
                weights.logits_bias,
                losses,
                beliefs,
                logits,
                hidden,
                dlogits,
                0 if prior is None else prior.stride(0),
                0 if hard else spec.target.stride(0),
                1 if isinstance(alpha, Tensor) else -1,
                rows,
                stages,
                scan_rows,
                options.ignore_index,
                0.0 if isinstance(alpha, Tensor) else alpha,
                options.label_smoothing,
                1.0 / classes,
                1.0 / rows if options.reduction == "mean" else 1.0,
                HAS_PRIOR=prior is not None,
                HARD=hard,
                REVERSE=options.reverse,
                NEED_GRAD=need_grad,
                **constants(plan, classes, hidden_dim, features.shape[1]),
                **launch_options(plan),
            )
    if not need_grad:
        return CascadeOutputs(losses, beliefs, logits, None)
    hidden, dhidden = (x.view(rows, stages, hidden_dim).transpose(0, 1) for x in (hidden, pre))  # the kernel wrote pre
    return CascadeOutputs(losses, beliefs, logits, CascadeActivations(dlogits, hidden, dhidden))
