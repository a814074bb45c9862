"""What a belief head gets and gives, in canonical form: a linear layer and the local loss of its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadProblem(NamedTuple):
    """N rows; unit column strides, any row strides. The logits hidden @ weight^T + bias are nobody's argument."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (C, H), in hidden's dtype
    bias: Tensor | None  # (C,)
    prior: Tensor | None  # (N, C); None: uniform
    labels: Tensor | None  # (N,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (N, C)
    alpha: float | Tensor  # tensor: float32 on hidden's device, () or (N,)
    reverse: bool
    label_smoothing: float
    ignore_index: int
    reduction: str  # "mean" or "sum"
    need_belief: bool
    need_grad: bool
    need_hidden_grad: bool  # needs need_grad


class HeadPass(NamedTuple):
    """One pass through a head."""

    losses: Tensor  # (3, N) float32: loss, fidelity, consistency; each row's share of the reduced value
    belief: Tensor | None  # (N, C) in the prior's dtype, hidden's if there is none
    dlogits: Tensor | None  # (N, C) in hidden's dtype, for the weight's gradient dlogits^T @ hidden
    dhidden: Tensor | None  # (N, H)
