"""What a caller may pass and what every backend gets: the one place where arguments are checked.

`make_problem` turns the arguments of the public operations into a `Problem`, two-dimensional and valid, or
raises before anything was computed or written. It looks at metadata only: no value on a GPU is read.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward", "reverse")
REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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


def debug() -> bool:
    """SID_KERNELS_DEBUG=1: values on a GPU are checked too, which synchronises."""
    return os.environ.get("SID_KERNELS_DEBUG", "0") not in ("", "0")


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
        check_like("prior", prior, logits, shape)
        if (prior.dtype is torch.float64) != (logits.dtype is torch.float64):
            raise TypeError(f"prior has dtype {prior.dtype} and logits {logits.dtype}; float64 goes with float64 only")
        prior = rows_of(prior.detach() if prior.requires_grad else prior, classes)  # a constant, by the method
    labels, soft = target_of(target, logits, shape)
    check_support(divergence, label_smoothing, labels)
    if out is not None:
        _check_out(out, logits, prior, soft, alpha)
        out = rows_of(out, classes)
    return Problem(
        rows_of(logits, classes),
        prior,
        labels,
        soft,
        alpha_of(alpha, logits, shape),
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


def rows_of(x: Tensor, classes: int) -> Tensor:
    """(..., C) -> (N, C) with unit column stride; a view wherever the strides allow one."""
    if x.dim() != 2:
        x = x.reshape(-1, classes)
    return x if classes == 1 or x.stride(1) == 1 else x.contiguous()


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


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for the first label outside [0, classes) that is not ignore_index. Reads the labels."""
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise label_error(row, int(labels[row]), classes, ignore_index)


def label_error(row: int, label: int, classes: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"target has label {label} in row {row}; it must be in [0, {classes}) or equal ignore_index ({ignore_index})"
    )


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; it must be a torch.Tensor")


def check_like(name: str, x: Tensor, logits: Tensor, shape: torch.Size) -> None:
    check_tensor(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have the shape of logits, {tuple(shape)}")
    check_device(name, x, logits)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be float32, bfloat16, float16 or float64")


def check_device(name: str, x: Tensor, logits: Tensor) -> None:
    if x.device != logits.device:
        raise ValueError(f"{name} is on {x.device}; it must be on the device of logits, {logits.device}")


def target_of(target: Tensor, logits: Tensor, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    check_tensor("target", target)
    if target.dtype in DTYPES:
        if target.shape != shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)} and dtype {target.dtype}; class probabilities must have "
                f"the shape of logits, {tuple(shape)}"
            )
        check_device("target", target, logits)
        if target.dtype is torch.float64 and logits.dtype is not torch.float64:
            target = target.float()
        return None, rows_of(target.detach(), shape[-1])
    if target.dtype not in _INTEGERS:
        raise TypeError(
            f"target has dtype {target.dtype}; it must be an integer dtype (labels) or a float (probabilities)"
        )
    if target.shape != shape[:-1]:
        raise ValueError(f"target has shape {tuple(target.shape)}; labels must have shape {tuple(shape[:-1])}")
    check_device("target", target, logits)
    labels = target if target.dim() == 1 else target.reshape(-1)
    if labels.dtype is not torch.int64:
        labels = labels.long()
    return labels.contiguous(), None


def alpha_of(alpha: float | Tensor, logits: Tensor, shape: torch.Size) -> float | Tensor:
    if isinstance(alpha, Tensor):
        if not alpha.dtype.is_floating_point:
            raise TypeError(f"alpha has dtype {alpha.dtype}; it must be a floating dtype")
        if alpha.dim() and alpha.shape != shape[:-1]:
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must be () or one a row, {tuple(shape[:-1])}")
        check_device("alpha", alpha, logits)
        rows = alpha.detach().to(torch.float64 if logits.dtype is torch.float64 else torch.float32)
        rows = rows.reshape(-1).contiguous() if rows.dim() else rows
        return rows
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is of type {type(alpha).__name__}; it must be a float in [0, 1] or a tensor")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    return float(alpha)


def check_values(problem: Problem) -> None:
    """The checks that read values: alpha in [0, 1], labels in range. For CPU tensors, or under `debug`."""
    check_alpha(problem.alpha)
    if problem.labels is not None:
        check_labels(problem.labels, problem.logits.shape[1], problem.ignore_index)


def check_alpha(alpha: float | Tensor) -> None:
    """Raise ValueError for the first value of a tensor outside [0, 1]. Reads it."""
    if isinstance(alpha, Tensor):
        bad = ~((alpha >= 0) & (alpha <= 1))
        if bad.any():
            value = float(alpha[bad][0]) if alpha.dim() else float(alpha)
            raise ValueError(f"alpha is {value}; it must lie in [0, 1]")


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
