"""What a caller of `fused_belief_head` may pass and what runs: the one place where it is checked.

`make_head` looks at metadata only, before anything is computed or written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import (
    as_rows,
    canonical_alpha,
    canonical_target,
    check_device,
    check_dtype,
    check_tensor,
)
from ..local_loss.problem import check_options, check_support


class PriorHead(NamedTuple):
    """A prior that is never stored: the belief softmax(hidden @ weight.T + bias) of another head. A constant."""

    hidden: Tensor  # (..., H'), rows as the head's own
    weight: Tensor  # (C, H')
    bias: Tensor | None = None  # (C,)


class HeadProblem(NamedTuple):
    """The operation in canonical form: N rows, unit column strides, any row strides."""

    hidden: Tensor  # h, (N, H)
    weight: Tensor  # (C, H)
    bias: Tensor | None  # (C,)
    prior: Tensor | PriorHead | None  # (N, C); None: uniform
    labels: Tensor | None  # (N,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (N, C)
    alpha: float | Tensor  # tensor: float32, () or (N,)
    reverse: bool
    label_smoothing: float
    ignore_index: int
    reduction: str
    need_belief: bool
    need_grad: bool
    need_hidden_grad: bool

    def rows(self, part: slice) -> HeadProblem:
        """The same for some of the rows."""
        prior = self.prior
        if isinstance(prior, PriorHead):
            prior = prior._replace(hidden=prior.hidden[part])
        elif prior is not None:
            prior = prior[part]
        alpha = self.alpha[part] if isinstance(self.alpha, Tensor) and self.alpha.dim() else self.alpha
        labels, soft = (None if x is None else x[part] for x in (self.labels, self.soft))
        return self._replace(hidden=self.hidden[part], prior=prior, labels=labels, soft=soft, alpha=alpha)


class HeadPass(NamedTuple):
    """What a kernel that keeps the logits on chip returns for a `HeadProblem`."""

    losses: Tensor  # (3, N) float32: loss, fidelity, consistency; each row's share of the reduced value
    belief: Tensor | None  # (N, C), in the prior's dtype (the hidden's where there is none)
    dlogits: Tensor | None  # (N, C), in the hidden's dtype
    dhidden: Tensor | None  # (N, H)


def belief_dtype(dtype: torch.dtype, prior: Tensor | PriorHead | None, reverse: bool) -> torch.dtype:
    """Of the belief, and of a prior that is computed here: the prior's, or the hidden's, `dtype`.

    A prior head in half precision has its prior in float32 in the reverse divergence, which takes the logarithm: half
    precision would cut it off.
    """
    if isinstance(prior, Tensor):
        return prior.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and reverse and prior is not None else dtype


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    need_belief: bool,
    need_grad: bool,
    need_hidden_grad: bool,
) -> HeadProblem:
    classes = check_head("", hidden, weight, bias)
    check_options(divergence, label_smoothing, ignore_index, reduction)
    shape = hidden.shape[:-1] + (classes,)
    if isinstance(prior, tuple):
        prior = _prior_head(prior, hidden, classes)
    elif prior is not None:
        check_tensor("prior", prior)
        if prior.shape != shape:
            raise ValueError(f"prior has shape {tuple(prior.shape)}; it must be (..., C) = {tuple(shape)}")
        check_device("prior", prior, hidden)
        check_dtype("prior", prior)
        if (prior.dtype is torch.float64) != (hidden.dtype is torch.float64):
            raise TypeError(f"prior has dtype {prior.dtype} and hidden {hidden.dtype}; float64 goes with float64 only")
        prior = as_rows(prior.detach(), classes)
    labels, soft = canonical_target(target, hidden, shape)
    check_support(divergence, label_smoothing, labels)
    return HeadProblem(
        as_rows(hidden.detach(), hidden.shape[-1]),
        as_rows(weight.detach(), weight.shape[1]),
        None if bias is None else bias.detach(),
        prior,
        labels,
        soft,
        canonical_alpha(alpha, hidden, shape),
        divergence == "reverse",
        float(label_smoothing),
        ignore_index,
        reduction,
        need_belief,
        need_grad,
        need_hidden_grad,
    )


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """C of a linear layer whose parts fit together; `prefix` stands before their names in an error."""
    check_tensor(f"{prefix}hidden", hidden)
    check_tensor(f"{prefix}weight", weight)
    check_dtype(f"{prefix}hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden has shape (); it must be (..., H)")
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}; it must be (C, H) with at least one class and "
            f"H = {hidden.shape[-1]} (from {prefix}hidden)"
        )
    if bias is not None:
        check_tensor(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias has shape {tuple(bias.shape)}; it must be (C,) = ({weight.shape[0]},)")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{prefix}{name} has dtype {x.dtype}; it must be {prefix}hidden's, {hidden.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{prefix}{name} is on {x.device}; it must be on {prefix}hidden's device, {hidden.device}")
    return weight.shape[0]


def _prior_head(prior: tuple, hidden: Tensor, classes: int) -> PriorHead:
    if not 2 <= len(prior) <= 3:
        raise TypeError(f"prior is a tuple of {len(prior)}; as a head it must be (hidden, weight, bias)")
    prior = PriorHead(*prior)
    found = check_head("prior.", *prior)
    if found != classes:
        raise ValueError(f"prior.weight has {found} classes; it must have as many as weight, {classes}")
    if prior.hidden.shape[:-1] != hidden.shape[:-1]:
        rows = tuple(hidden.shape[:-1])
        raise ValueError(f"prior.hidden has shape {tuple(prior.hidden.shape)}; its rows must be hidden's, {rows}")
    if prior.hidden.dtype != hidden.dtype or prior.hidden.device != hidden.device:
        raise TypeError(
            f"prior.hidden has dtype {prior.hidden.dtype} on {prior.hidden.device}; "
            f"it must be like hidden: {hidden.dtype} on {hidden.device}"
        )
    return PriorHead(
        as_rows(prior.hidden.detach(), prior.hidden.shape[-1]),
        prior.weight.detach(),
        None if prior.bias is None else prior.bias.detach(),
    )
