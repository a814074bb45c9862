"""What a cascade of equal stages gets and gives, in canonical form, whatever the backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CascadeWeights(NamedTuple):
    """Of L equal stages of C classes, D features and H hidden units; contiguous, all of one dtype."""

    hidden_weight: Tensor  # (L, H, C + D): columns [:C] act on the belief, [C:] on the features
    hidden_bias: Tensor  # (L, H)
    logits_weight: Tensor  # (L, C, H)
    logits_bias: Tensor  # (L, C)


class CascadeProblem(NamedTuple):
    """Stage i: h_i = relu(hidden_weight[i] @ [p_{i-1}, f] + hidden_bias[i]), p_i = softmax(logits_weight[i] @ h_i +
    logits_bias[i]), and the local loss of p_i with the prior p_{i-1}, a constant."""

    features: Tensor  # (B, D), in the weights' dtype
    weights: CascadeWeights
    prior: Tensor | None  # (B, C), p_0, any row stride; None: uniform
    labels: Tensor | None  # (B,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (B, C), any row stride
    alpha: float | Tensor  # tensor: (L,) float32 on the features' device
    reverse: bool
    label_smoothing: float
    ignore_index: int
    reduction: str  # "mean" or "sum"
    need_grad: bool


class CascadePass(NamedTuple):
    """One pass through all stages. The last three are None unless gradients were asked for."""

    losses: Tensor  # (3, L, B) float32: loss, fidelity, consistency; each row's share of the reduced value
    beliefs: Tensor  # (L, B, C) in the weights' dtype
    logits: Tensor  # (B, C) of the last stage, in the weights' dtype
    hidden: Tensor | None  # (L, B, H) after the ReLU
    dlogits: Tensor | None  # (L, B, C)
    dhidden: Tensor | None  # (L, B, H), the gradient at the ReLU's input
