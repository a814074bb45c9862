"""What a caller may pass and what every backend gets: the one place where arguments are checked.

`make_problem` turns the arguments of the public operations into a `Problem`, two-dimensional and valid, or
raises before anything was computed or written. It looks at metadata only: no value on a GPU is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import (
    DTYPES,
    as_rows,
    canonical_alpha,
    canonical_target,
    check_alpha_values,
    check_device,
    check_dtype,
    check_labels,
    check_tensor,
)

DIVERGENCES = ("forward", "reverse")
REDUCTIONS = ("none", "mean", "sum")


class Problem(NamedTuple):
    """The operation in canonical form: N rows of C classes, unit column strides, any row strides."""

    logits: Tensor  # (N, C)
    prior: Tensor | None  # (N, C); None: uniform
    labels: Tensor | None  # (N,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (N, C)
    alpha: float | Tensor  # tensor: float32 on the logits' device, () or (N,)
    reverse: bool
    label_smoothing: float
    ignore_index: int
    reduction: str
    out: Tensor | None  # (N, C), where dlogits goes; None: allocate
    need_grad: bool
    need_belief: bool = True
    belief_out: Tensor | None = None  # (N, C) contiguous, where the belief goes; None: allocate


class LocalLoss(NamedTuple):
    """Result of the local loss of a stage.

    loss: alpha * fidelity + (1 - alpha) * consistency, in nats; () for reduction "mean" and "sum", (...) for "none";
        float32 (float64 for float64 logits). The only differentiable part, in logits alone.
    belief: softmax(logits), (..., C), contiguous, in the prior's dtype (the logits' where there is no prior);
        None where it was not asked for.
    fidelity: CE(y, p) (forward) or KL(p || y) (reverse), shaped and reduced like loss.
    consistency: KL(q || p) (forward) or KL(p || q) (reverse), shaped and reduced like loss.
    """

    loss: Tensor
    belief: Tensor | None
    fidelity: Tensor
    consistency: Tensor


class Result(NamedTuple):
    """What a backend returns for a `Problem`."""

    loss: Tensor  # () or (N,), float32 (float64 for float64 logits)
    fidelity: Tensor  # likewise
    consistency: Tensor  # likewise
    belief: Tensor | None  # (N, C), contiguous; None: not wanted
    dlogits: Tensor | None  # (N, C), the gradient of the reduced loss; None: not wanted


def make_problem(
    logits: Tensor,
    prior: Tensor | None,
    target: Tensor,
    alpha: float | Tensor,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    out: Tensor | None,
    need_grad: bool,
    need_belief: bool = True,
) -> Problem:
    check_tensor("logits", logits)
    shape = logits.shape
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"logits has dtype {logits.dtype}; it must be float32, bfloat16 or float16 (float64: reference backend)"
        )
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(shape)}; it must be (..., C) with at least one class")
    classes = shape[-1]
    check_options(divergence, label_smoothing, ignore_index, reduction)
    reverse = divergence == "reverse"
    if prior is not None:
        check_tensor("prior", prior)
        if prior.shape != shape:
            raise ValueError(f"prior has shape {tuple(prior.shape)}; it must have the shape of logits, {tuple(shape)}")
        check_device("prior", prior, logits)
        check_dtype("prior", prior)
        if (prior.dtype is torch.float64) != (logits.dtype is torch.float64):
            raise TypeError(f"prior has dtype {prior.dtype} and logits {logits.dtype}; float64 goes with float64 only")
        prior = as_rows(prior.detach() if prior.requires_grad else prior, classes)  # a constant, by the method
    labels, soft = canonical_target(target, logits, shape)
    check_support(divergence, label_smoothing, labels)
    if out is not None:
        _check_out(out, logits, prior, soft, alpha)
        out = as_rows(out, classes)
    return Problem(
        as_rows(logits, classes),
        prior,
        labels,
        soft,
        canonical_alpha(alpha, logits, shape),
        reverse,
        float(label_smoothing),
        ignore_index,
        reduction,
        out,
        need_grad,
        need_belief,
    )


def check_options(
    divergence: str, label_smoothing: float, ignore_index: int, reduction: str, reductions: tuple = REDUCTIONS
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it must be one of {DIVERGENCES}")
    if reduction not in reductions:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {reductions}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing is of type {type(label_smoothing).__name__}; it must be a float in [0, 1]")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1]")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is of type {type(ignore_index).__name__}; it must be an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; it must fit 64 bits")


def check_support(divergence: str, label_smoothing: float, labels: Tensor | None) -> None:
    if divergence == "reverse" and labels is not None and not label_smoothing > 0.0:
        raise ValueError(
            "divergence='reverse' needs a target of full support: label_smoothing is 0 and target is hard labels; "
            "it must be > 0, or target must be class probabilities"
        )


def belief_memory(problem: Problem) -> Tensor | None:
    """Where a backend writes the belief; None: nowhere."""
    if not problem.need_belief or problem.belief_out is not None:
        return problem.belief_out
    z = problem.logits
    dtype = z.dtype if problem.prior is None else problem.prior.dtype
    return torch.empty_strided(z.shape, (z.shape[1], 1), dtype=dtype, device=z.device)


def scale_of_mean(labels: Tensor | None, ignore_index: int, rows: Tensor) -> Tensor:
    """1 over the number of rows that count, () in float32 (float64 for float64), on the device of `rows` (N, ...).

    A tensor: nobody waits for a device to tell a number.
    """
    compute = torch.float64 if rows.dtype is torch.float64 else torch.float32
    if labels is None:
        return torch.full((), 1.0 / max(rows.shape[0], 1), dtype=compute, device=rows.device)
    return 1.0 / (labels != ignore_index).sum().clamp(min=1).to(compute)


def check_values(problem: Problem) -> None:
    """The checks that read values: alpha in [0, 1], labels in range. For CPU tensors, or under `debug`."""
    check_alpha_values(problem.alpha)
    if problem.labels is not None:
        check_labels(problem.labels, problem.logits.shape[1], problem.ignore_index)


def check_out_like(out: Tensor, logits: Tensor) -> None:
    check_tensor("logits", logits)
    check_tensor("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, dtype {out.dtype} on {out.device}; it must be like logits: "
            f"{tuple(logits.shape)}, {logits.dtype} on {logits.device}"
        )


def _check_out(out: Tensor, logits: Tensor, prior: Tensor | None, soft: Tensor | None, alpha: float | Tensor) -> None:
    check_out_like(out, logits)
    strides = out.stride()
    viewable = out.dim() == 2 or out.is_contiguous()
    if (
        not viewable
        or (out.shape[-1] > 1 and strides[-1] != 1)
        or (out.dim() == 2 and out.shape[0] > 1 and strides[0] < out.shape[1])
    ):
        raise ValueError(f"out has strides {strides}; its columns must be adjacent and its rows apart")
    storage = out.untyped_storage().data_ptr()
    if storage == logits.untyped_storage().data_ptr():
        if out.data_ptr() != logits.data_ptr() or strides != logits.stride():
            raise ValueError("out overlaps logits; it must be logits itself or memory of its own")
    for name, x in (("prior", prior), ("target", soft), ("alpha", alpha)):
        if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() == storage:
            raise ValueError(f"out shares memory with {name}; it must be logits itself or memory of its own")
