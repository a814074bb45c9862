"""Check the arguments that every operation shares, and convert them to canonical forms.

All checks except `check_values` and what it calls look at metadata only: they read no value from a GPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .options import LossOptions, LossSpec, compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def debug_enabled() -> bool:
    """Return whether SID_KERNELS_DEBUG=1 asks to check values on a GPU too, which synchronizes."""
    return os.environ.get("SID_KERNELS_DEBUG", "0") not in ("", "0")


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError if x is not a tensor, or has no dense rows: nested, sparse, masked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; it must be a torch.Tensor")
    masked = not is_dynamo_compiling() and type(x).__name__ == "MaskedTensor"
    if x.is_nested or x.layout is not torch.strided or masked:
        kind = "nested" if x.is_nested else "masked" if masked else str(x.layout)
        raise TypeError(f"{name} is a {kind} tensor; it must be a dense one: pass its values, or pad it")


def materialize(x: Tensor) -> Tensor:
    """Return x with its values in memory, instead of a view with the negative bit or a tensor of implied zeros."""
    if x.is_neg():
        x = x.resolve_neg()
    return torch.zeros_like(x) if x._is_zerotensor() else x


def check_device(name: str, x: Tensor, logits: Tensor) -> None:
    """Raise ValueError if x is not on the device of the logits."""
    if x.device != logits.device:
        raise ValueError(f"{name} is on {x.device}; it must be on the device of logits, {logits.device}")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError if x is not float32, bfloat16, float16 or float64."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be float32, bfloat16, float16 or float64")


def as_rows(x: Tensor, columns: int) -> Tensor:
    """Return x (..., C) as (N, C) with adjacent columns: a view if the strides allow one, else a copy."""
    x = materialize(x)
    if x.dim() != 2:
        x = x.reshape(-1, columns)
    return x if columns == 1 or x.stride(1) == 1 else x.contiguous()


def canonical_target(target: Tensor, logits: Tensor, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """Return (labels (N,) int64, None) or (None, class probabilities (N, C)) for logits of `shape` (..., C)."""
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
        return None, as_rows(target.detach(), shape[-1])
    if target.dtype not in _INTEGERS:
        raise TypeError(
            f"target has dtype {target.dtype}; it must be an integer dtype (labels) or a float (probabilities)"
        )
    if target.shape != shape[:-1]:
        raise ValueError(f"target has shape {tuple(target.shape)}; labels must have shape {tuple(shape[:-1])}")
    check_device("target", target, logits)
    target = materialize(target)
    labels = target if target.dim() == 1 else target.reshape(-1)
    if labels.dtype is not torch.int64:
        labels = labels.long()
    return labels.contiguous(), None


def canonical_alpha(alpha: float | Tensor, logits: Tensor, shape: torch.Size) -> float | Tensor:
    """Return alpha as a float in [0, 1], or as a float32 tensor () or (N,) for logits of `shape` (..., C).

    The tensor is float64 for float64 logits. Its values are not read.
    """
    if isinstance(alpha, Tensor):
        if not alpha.dtype.is_floating_point:
            raise TypeError(f"alpha has dtype {alpha.dtype}; it must be a floating dtype")
        if alpha.dim() and alpha.shape != shape[:-1]:
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must be () or one per row, {tuple(shape[:-1])}")
        check_device("alpha", alpha, logits)
        alpha = materialize(alpha.detach()).to(compute_dtype(logits))
        return alpha.reshape(-1).contiguous() if alpha.dim() else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is of type {type(alpha).__name__}; it must be a float in [0, 1] or a tensor")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    return float(alpha)


def make_spec(
    target: Tensor, alpha: float | Tensor, options: LossOptions, logits: Tensor, shape: torch.Size
) -> LossSpec:
    """Return the checked spec of a loss of logits of `shape` (..., C), on the device and in the dtype of `logits`."""
    labels, soft = canonical_target(target, logits, shape)
    check_support(options, labels)
    return LossSpec(labels, soft, canonical_alpha(alpha, logits, shape), options)


def check_support(options: LossOptions, labels: Tensor | None) -> None:
    """Raise ValueError for the reverse divergence with hard labels that are not smoothed: it would be infinite."""
    if options.reverse and labels is not None and not options.label_smoothing > 0.0:
        raise ValueError(
            "divergence='reverse' needs a target of full support: label_smoothing is 0 and target is hard labels; "
            "it must be > 0, or target must be class probabilities"
        )


def check_values(spec: LossSpec, classes: int) -> None:
    """Raise ValueError for a tensor alpha outside [0, 1], IndexError for a label out of range; read both."""
    check_alpha_values(spec.alpha)
    if spec.labels is not None:
        check_labels(spec.labels, classes, spec.options.ignore_index)


def check_alpha_values(alpha: float | Tensor) -> None:
    """Raise ValueError for the first value of a tensor alpha outside [0, 1]; read the values."""
    if isinstance(alpha, Tensor):
        bad = ~((alpha >= 0) & (alpha <= 1))
        if bad.any():
            value = float(alpha[bad][0]) if alpha.dim() else float(alpha)
            raise ValueError(f"alpha is {value}; it must lie in [0, 1]")


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for the first label outside [0, classes) that is not ignore_index; read the labels."""
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise label_error(row, int(labels[row]), classes, ignore_index)


def label_error(row: int, label: int, classes: int, ignore_index: int) -> IndexError:
    """Return the error for a label out of range."""
    return IndexError(
        f"target has label {label} in row {row}; it must be in [0, {classes}) or equal ignore_index ({ignore_index})"
    )
