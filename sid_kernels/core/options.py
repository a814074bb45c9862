"""The loss options that every operation has, and what a loss is measured against."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # dtypes whose gradients wait for the incoming gradient before they are rounded
LIFT = 256.0  # gradients of row losses, about 1 and at most about 100, are multiplied by this in float16
DIVERGENCES = ("forward", "reverse")
REDUCTIONS = ("none", "mean", "sum")
_REDUCTION_CODES = {"none": 0, "mean": 1, "sum": 2}  # Reduction in csrc/local_loss.h


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and losses of x, and of unrounded gradients: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class LossOptions:
    """Options of the local loss, checked when made; `fused_local_loss` documents them.

    Raises:
        TypeError, ValueError: an option of the wrong type or outside its range.
    """

    divergence: str = "forward"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("reduction", self.reduction, REDUCTIONS)
        smoothing, index = self.label_smoothing, self.ignore_index
        if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)):
            raise TypeError(f"label_smoothing is of type {type(smoothing).__name__}; it must be a float in [0, 1]")
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {smoothing}; it must lie in [0, 1]")
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"ignore_index is of type {type(index).__name__}; it must be an int")
        if not -(2**63) <= index < 2**63:
            raise ValueError(f"ignore_index is {index}; it must fit 64 bits")
        object.__setattr__(self, "label_smoothing", float(smoothing))

    @functools.cached_property
    def reverse(self) -> bool:
        """Whether the divergence is reverse."""
        return self.divergence == "reverse"

    @functools.cached_property
    def packed(self) -> tuple[bool, float, int, int]:
        """The fields of LossOptions in csrc/local_loss.h."""
        return self.reverse, self.label_smoothing, self.ignore_index, _REDUCTION_CODES[self.reduction]


def make_options(*values: object) -> LossOptions:
    """Return LossOptions(*values), cached, because the checks take longer than a small call."""
    try:
        return _cached(*values)
    except TypeError:  # also for a value that has no hash, which LossOptions names
        return LossOptions(*values)  # type: ignore[arg-type]  # what has the wrong type is refused there


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {allowed}")


DEFAULTS = LossOptions()
OPTION_NAMES = tuple(field.name for field in dataclasses.fields(LossOptions))
_cached = functools.lru_cache(maxsize=64, typed=True)(LossOptions)


class LossSpec(NamedTuple):
    """What a loss is measured against: target, alpha and options, in canonical form."""

    labels: Tensor | None  # (N,) int64; exactly one of labels and soft is given
    soft: Tensor | None  # (N, C) class probabilities
    alpha: float | Tensor  # tensor: float32 on the logits' device, () or one for each row (cascade: each stage)
    options: LossOptions

    @property
    def target(self) -> Tensor:
        """The labels (N,) or the class probabilities (N, C)."""
        target = self.soft if self.labels is None else self.labels
        assert target is not None
        return target

    def rows(self, part: slice) -> LossSpec:
        """Return the spec of some of the rows."""
        alpha = self.alpha[part] if isinstance(self.alpha, Tensor) and self.alpha.dim() else self.alpha
        labels, soft = (None if x is None else x[part] for x in (self.labels, self.soft))
        return LossSpec(labels, soft, alpha, self.options)
