"""The fused local loss in plain PyTorch: the definition, on any device, in float32 or float64.

The other backends must agree with this one. It is written to be read, not to be fast. The gradient is the closed form
(arXiv 2510.03273), so a gradient check in float64 checks that form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.options import LossSpec, compute_dtype
from .problem import LocalLossOutputs, LocalLossProblem, allocate_belief

# Logarithms of probabilities are taken at no less than float32's smallest normal number.
TINY = torch.finfo(torch.float32).tiny


class Classes(NamedTuple):
    """Which of the classes the columns are: all of them, or a shard whose sums are completed across processes."""

    number: int  # C
    first: int = 0  # the class of the first column
    sum: Callable[[Tensor], Tensor] = lambda x: x.sum(-1)  # over all classes, (N, columns) -> (N,)
    log_softmax: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1)


def run(problem: LocalLossProblem, classes: Classes | None = None) -> LocalLossOutputs:
    """Return loss, belief and gradient of a problem; classes: None if the columns are all classes."""
    z, spec = problem.logits, problem.spec  # z: (N, C)
    classes = Classes(z.shape[1]) if classes is None else classes
    dtype = compute_dtype(z)
    log_p = classes.log_softmax(z.to(dtype))  # (N, C)
    p = log_p.exp()
    q = torch.full_like(p, 1.0 / classes.number) if problem.prior is None else problem.prior.to(dtype)
    y, counts, valid = _target(spec, p, classes)  # (N, C), (N,), (N,)
    alpha = _column(spec.alpha, p)  # (N, 1)

    if spec.options.reverse:  # alpha KL(p || y) + (1 - alpha) KL(p || q)
        log_y, log_q = _log(y), _log(q)
        fidelity = classes.sum(_times(p, log_p - log_y))
        consistency = classes.sum(_times(p, log_p - log_q))
        u = log_p - alpha * log_y - (1 - alpha) * log_q
        mean_u = classes.sum(_times(p, u))[:, None]
        gradient = _times(p, u - mean_u)
    else:  # alpha CE(y, p) + (1 - alpha) KL(q || p)
        fidelity = -classes.sum(_times(y, log_p))
        consistency = classes.sum(q * _log(q) - _times(q, log_p))
        mass = alpha * classes.sum(y)[:, None] + (1 - alpha) * classes.sum(q)[:, None]
        gradient = mass * p - alpha * y - (1 - alpha) * q
    alpha = alpha[:, 0]
    loss = _times(alpha, fidelity) + _times(1 - alpha, consistency)

    loss, fidelity, consistency = (_mask_rows(x, counts, valid) for x in (loss, fidelity, consistency))  # (N,) each
    if problem.incoming is not None:
        gradient = gradient * _column(problem.incoming, p)
    gradient = _mask_rows(gradient, counts[:, None], valid[:, None])
    if spec.options.reduction != "none":
        loss, fidelity, consistency = loss.sum(), fidelity.sum(), consistency.sum()
    if spec.options.reduction == "mean":
        number = counts.sum().clamp(min=1)
        loss, fidelity, consistency, gradient = (x / number for x in (loss, fidelity, consistency, gradient))

    dlogits, belief = None, allocate_belief(problem)
    if belief is not None:
        belief.copy_(p)
    if problem.need_grad:
        dlogits = gradient.to(z.dtype) if problem.out is None else problem.out.copy_(gradient)
    return LocalLossOutputs(loss, belief, fidelity, consistency, dlogits)


def _target(spec: LossSpec, p: Tensor, classes: Classes) -> tuple[Tensor, Tensor, Tensor]:
    """Return smoothed target probabilities (N, columns), and masks (N,) of rows that count and of labels in range."""
    rows, columns = p.shape
    smoothing, labels = spec.options.label_smoothing, spec.labels
    if labels is None:
        everywhere = torch.ones(rows, dtype=torch.bool, device=p.device)
        return (1 - smoothing) * spec.target.to(p.dtype) + smoothing / classes.number, everywhere, everywhere
    counts = labels != spec.options.ignore_index
    valid = (labels >= 0) & (labels < classes.number)
    off = smoothing / classes.number
    y = torch.full_like(p, off)
    column = torch.where(valid, labels, 0) - classes.first
    here = (column >= 0) & (column < columns)
    on_label = torch.full_like(p[:, 0:1], 1 - smoothing + off).masked_fill(~here[:, None], off)
    if columns:
        y = y.scatter(1, torch.where(here, column, 0)[:, None], on_label)
    return y, counts, valid


def _mask_rows(x: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """Return x with 0 in ignored rows and NaN in rows whose label is out of range."""
    return torch.where(counts, torch.where(valid, x, torch.nan), 0.0)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, where a = 0 gives 0 even if b = -inf."""
    return torch.where(a == 0, 0.0, a * b)


def _log(q: Tensor) -> Tensor:
    """Return the logarithm of probabilities."""
    return q.clamp(min=TINY).log()


def _column(alpha: float | Tensor, like: Tensor) -> Tensor:
    """Return alpha as (N, 1)."""
    if isinstance(alpha, Tensor):
        return alpha.to(like.dtype).reshape(-1, 1).expand(like.shape[0], 1)
    return torch.full((like.shape[0], 1), alpha, dtype=like.dtype, device=like.device)
