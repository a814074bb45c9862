"""The fused local loss in plain PyTorch: the definition, on any device, in float32 or float64.

The other backends must agree with this one; it favours being readable over being fast. The gradient is the
closed form (arXiv 2510.03273), so a gradient check in float64 is a check of that form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, Result, belief_memory

# Logarithms of probabilities are taken at no less than float32's smallest normal number.
TINY = torch.finfo(torch.float32).tiny


def run(problem: Problem) -> Result:
    z = problem.logits  # (N, C)
    dtype = torch.float64 if z.dtype is torch.float64 else torch.float32
    rows, classes = z.shape
    log_p = z.to(dtype).log_softmax(-1)  # (N, C)
    p = log_p.exp()
    q = torch.full_like(p, 1.0 / classes) if problem.prior is None else problem.prior.to(dtype)
    y, counts, valid = _target(problem, p)  # (N, C), (N,), (N,)
    alpha = _column(problem.alpha, p)  # (N, 1)

    if problem.reverse:  # alpha KL(p || y) + (1 - alpha) KL(p || q)
        log_y, log_q = _log(y), _log(q)
        fidelity = _times(p, log_p - log_y).sum(-1)
        consistency = _times(p, log_p - log_q).sum(-1)
        u = log_p - alpha * log_y - (1 - alpha) * log_q
        mean_u = _times(p, u).sum(-1, keepdim=True)
        gradient = _times(p, u - mean_u)
    else:  # alpha CE(y, p) + (1 - alpha) KL(q || p)
        fidelity = -_times(y, log_p).sum(-1)
        consistency = (q * _log(q) - _times(q, log_p)).sum(-1)
        mass = alpha * y.sum(-1, keepdim=True) + (1 - alpha) * q.sum(-1, keepdim=True)
        gradient = mass * p - alpha * y - (1 - alpha) * q
    alpha = alpha[:, 0]
    loss = _times(alpha, fidelity) + _times(1 - alpha, consistency)

    losses = [_only(x, counts, valid) for x in (loss, fidelity, consistency)]  # (N,) each
    gradient = _only(gradient, counts[:, None], valid[:, None])
    if problem.reduction != "none":
        losses = [x.sum() for x in losses]
    if problem.reduction == "mean":
        number = counts.sum().clamp(min=1)
        losses = [x / number for x in losses]
        gradient = gradient / number

    dlogits, belief = None, belief_memory(problem)
    if belief is not None:
        belief.copy_(p)
    if problem.need_grad:
        dlogits = gradient.to(z.dtype) if problem.out is None else problem.out.copy_(gradient)
    return Result(*losses, belief, dlogits)


def _target(problem: Problem, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target probabilities after smoothing, which rows count, which have a label in range."""
    rows, classes = p.shape
    smoothing, labels = problem.label_smoothing, problem.labels
    everywhere = torch.ones(rows, dtype=torch.bool, device=p.device)
    if labels is None:
        return (1 - smoothing) * problem.soft.to(p.dtype) + smoothing / classes, everywhere, everywhere
    counts = labels != problem.ignore_index
    valid = (labels >= 0) & (labels < classes)
    y = torch.full_like(p, smoothing / classes)
    on_label = torch.full_like(p[:, :1], 1 - smoothing + smoothing / classes)
    y = y.scatter(1, torch.where(valid, labels, 0)[:, None], on_label)
    return y, counts, valid


def _only(x: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """0 where a row does not count, NaN where its label is out of range."""
    return torch.where(counts, torch.where(valid, x, torch.nan), 0.0)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b, where a = 0 wins even over b = -inf."""
    return torch.where(a == 0, 0.0, a * b)


def _log(q: Tensor) -> Tensor:
    return q.clamp(min=TINY).log()


def _column(alpha: float | Tensor, like: Tensor) -> Tensor:
    """alpha -> (N, 1)."""
    if isinstance(alpha, Tensor):
        return alpha.to(like.dtype).reshape(-1, 1).expand(like.shape[0], 1)
    return torch.full((like.shape[0], 1), alpha, dtype=like.dtype, device=like.device)
