"""Arguments of `fused_belief_head` in canonical form: the one place where they are checked.

`make_problem` looks at metadata only, before anything is computed or written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import as_rows, check_device, check_dtype, check_tensor, make_spec
from ..core.options import LossOptions, LossSpec


class PriorHead(NamedTuple):
    """A prior that is never stored: the belief softmax(hidden @ weight.T + bias) of another head. A constant."""

    hidden: Tensor  # (..., H'), with the rows of the head's own hidden
    weight: Tensor  # (C, H')
    bias: Tensor | None = None  # (C,)


class LinearLayer(NamedTuple):
    """The inputs of a linear layer, logits = hidden @ weight.T + bias."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (C, H)
    bias: Tensor | None  # (C,)


class Gradients(NamedTuple):
    """Gradients of the inputs of a head; None: not needed."""

    hidden: Tensor | None  # (..., H)
    weight: Tensor | None  # (C, H)
    bias: Tensor | None  # (C,)


class NeedGrad(NamedTuple):
    """Which gradients of a head are needed."""

    hidden: bool
    weight: bool
    bias: bool


class BeliefHeadProblem(NamedTuple):
    """A belief head over N rows; columns are adjacent, rows have any stride."""

    hidden: Tensor  # h, (N, H)
    weight: Tensor  # (C, H)
    bias: Tensor | None  # (C,)
    prior: Tensor | PriorHead | None  # (N, C); None: uniform
    spec: LossSpec
    need_belief: bool
    need: NeedGrad

    @property
    def need_grad(self) -> bool:
        """Whether any gradient is needed."""
        return any(self.need)

    def rows(self, part: slice) -> BeliefHeadProblem:
        """Return the problem of some of the rows."""
        prior = self.prior
        if isinstance(prior, PriorHead):
            prior = prior._replace(hidden=prior.hidden[part])
        elif prior is not None:
            prior = prior[part]
        return self._replace(hidden=self.hidden[part], prior=prior, spec=self.spec.rows(part))


class BeliefHeadOutputs(NamedTuple):
    """What a kernel that keeps the logits on chip returns for a `BeliefHeadProblem`."""

    losses: Tensor  # (3, N) float32: loss, fidelity and consistency; each row's share of the reduced value
    belief: Tensor | None  # (N, C), in the prior's dtype (the hidden's without a prior)
    dlogits: Tensor | None  # (N, C), in the hidden's dtype
    dhidden: Tensor | None  # (N, H) float32


def belief_dtype(dtype: torch.dtype, prior: Tensor | PriorHead | None, reverse: bool) -> torch.dtype:
    """Return the dtype of the belief, and of a prior computed here: the prior's, or `dtype`, the hidden's.

    The reverse divergence takes the logarithm of a prior head's belief, which half precision would cut off: for a
    hidden in half precision it is float32.
    """
    if isinstance(prior, Tensor):
        return prior.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and reverse and prior is not None else dtype


def make_problem(
    layer: LinearLayer,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor,
    options: LossOptions,
    need_belief: bool,
    need: NeedGrad,
) -> BeliefHeadProblem:
    """Check the arguments of `fused_belief_head`, and return their problem.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    hidden, weight, bias = layer
    classes = check_layer("", layer)
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
    return BeliefHeadProblem(
        as_rows(hidden.detach(), hidden.shape[-1]),
        as_rows(weight.detach(), weight.shape[1]),
        None if bias is None else bias.detach(),
        prior,
        make_spec(target, alpha, options, hidden, shape),
        need_belief,
        need,
    )


def check_layer(prefix: str, layer: LinearLayer | PriorHead) -> int:
    """Return C of a linear layer whose inputs fit together; `prefix` precedes their names in an error."""
    hidden, weight, bias = layer
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
    """Return a checked prior head, its hidden as (N, H')."""
    if not 2 <= len(prior) <= 3:
        raise TypeError(f"prior is a tuple of {len(prior)}; as a head it must be (hidden, weight, bias)")
    head = PriorHead(*prior)
    prior_classes = check_layer("prior.", head)
    if prior_classes != classes:
        raise ValueError(f"prior.weight has {prior_classes} classes; it must have as many as weight, {classes}")
    if head.hidden.shape[:-1] != hidden.shape[:-1]:
        rows = tuple(hidden.shape[:-1])
        raise ValueError(f"prior.hidden has shape {tuple(head.hidden.shape)}; its rows must be hidden's, {rows}")
    if head.hidden.dtype != hidden.dtype or head.hidden.device != hidden.device:
        raise TypeError(
            f"prior.hidden has dtype {head.hidden.dtype} on {head.hidden.device}; "
            f"it must be like hidden: {hidden.dtype} on {hidden.device}"
        )
    return PriorHead(
        as_rows(head.hidden.detach(), head.hidden.shape[-1]),
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
    )
