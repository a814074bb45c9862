"""Arguments of the local loss in canonical form, and the results: the one place where both are defined.

`make_problem` raises before anything is computed or written. It looks at metadata only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import DTYPES, as_rows, check_device, check_dtype, check_tensor, make_spec
from ..core.memory import empty_matrix
from ..core.options import LossOptions, LossSpec, compute_dtype

_new = torch.empty_strided  # half the overhead of torch.empty


class LocalLossProblem(NamedTuple):
    """The local loss of N rows of C classes; columns are adjacent, rows have any stride."""

    logits: Tensor  # (N, C)
    prior: Tensor | None  # (N, C); None: uniform
    spec: LossSpec
    need_grad: bool
    need_belief: bool = True
    out: Tensor | None = None  # (N, C), where dlogits goes; None: new memory
    belief_out: Tensor | None = None  # (N, C) contiguous, where the belief goes; None: new memory
    incoming: Tensor | None = None  # () or (N,) float32; multiplies dlogits before they are rounded; None: 1
    precomputed: bool = False  # `out` holds the gradient for an incoming number of 1; cuda then writes nothing


class LocalLoss(NamedTuple):
    """Result of the local loss of a stage.

    loss: alpha * fidelity + (1 - alpha) * consistency, in nats; () for reduction "mean" and "sum", (...) for "none";
        float32 (float64 for float64 logits). The only differentiable part, in logits alone.
    belief: softmax(logits), (..., C), contiguous, in the prior's dtype (the logits' dtype without a prior);
        None if it was not asked for.
    fidelity: CE(y, p) (forward) or KL(p || y) (reverse), shaped and reduced like loss.
    consistency: KL(q || p) (forward) or KL(p || q) (reverse), shaped and reduced like loss.
    """

    loss: Tensor
    belief: Tensor | None
    fidelity: Tensor
    consistency: Tensor


class LocalLossOutputs(NamedTuple):
    """What a backend returns for a `LocalLossProblem`."""

    loss: Tensor  # () or (N,), float32 (float64 for float64 logits)
    belief: Tensor | None  # (N, C), contiguous; None: not needed
    fidelity: Tensor  # like loss
    consistency: Tensor  # like loss
    dlogits: Tensor | None  # (N, C), the gradient of the reduced loss ("none": of the sum); None: not needed


def make_problem(
    logits: Tensor,
    prior: Tensor | None,
    target: Tensor,
    alpha: float | Tensor,
    options: LossOptions,
    *,
    need_grad: bool = True,
    need_belief: bool = True,
    out: Tensor | None = None,
) -> LocalLossProblem:
    """Check the arguments of `fused_local_loss`, and return their problem.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
    """
    check_tensor("logits", logits)
    shape = logits.shape
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"logits has dtype {logits.dtype}; it must be float32, bfloat16 or float16 (float64: reference backend)"
        )
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(shape)}; it must be (..., C) with at least one class")
    classes = shape[-1]
    if prior is not None:
        check_tensor("prior", prior)
        if prior.shape != shape:
            raise ValueError(f"prior has shape {tuple(prior.shape)}; it must have the shape of logits, {tuple(shape)}")
        check_device("prior", prior, logits)
        check_dtype("prior", prior)
        if (prior.dtype is torch.float64) != (logits.dtype is torch.float64):
            raise TypeError(f"prior has dtype {prior.dtype} and logits {logits.dtype}; float64 goes with float64 only")
        prior = as_rows(prior.detach() if prior.requires_grad else prior, classes)  # a constant, by the method
    spec = make_spec(target, alpha, options, logits, shape)
    if out is not None:
        _check_out(out, logits, (("prior", prior), ("target", spec.soft), ("alpha", alpha)))
        out = as_rows(out.detach(), classes)
    logits = as_rows(logits.detach() if logits.requires_grad else logits, classes)  # backends record no graph
    return LocalLossProblem(logits, prior, spec, need_grad, need_belief, out)


def allocate(problem: LocalLossProblem) -> LocalLossOutputs:
    """Allocate the outputs of a problem, in float32 except belief and dlogits."""
    logits = problem.logits
    shape, device = logits.shape, logits.device
    dlogits = problem.out
    if not problem.need_grad:
        dlogits = None
    elif dlogits is None:
        dlogits = empty_matrix(shape, logits.dtype, device)
    size, strides = ((shape[0],), (1,)) if problem.spec.options.reduction == "none" else ((), ())
    loss = _new(size, strides, dtype=torch.float32, device=device)
    fidelity = _new(size, strides, dtype=torch.float32, device=device)
    consistency = _new(size, strides, dtype=torch.float32, device=device)
    return LocalLossOutputs(loss, allocate_belief(problem), fidelity, consistency, dlogits)


def allocate_belief(problem: LocalLossProblem) -> Tensor | None:
    """Return the memory (N, C) for the belief, new or given with the problem, or None if it is not needed."""
    if not problem.need_belief or problem.belief_out is not None:
        return problem.belief_out
    z = problem.logits
    dtype = z.dtype if problem.prior is None else problem.prior.dtype
    return empty_matrix(z.shape, dtype, z.device)


def scale_of_mean(spec: LossSpec, rows: Tensor) -> Tensor:
    """Return 1 over the number of rows that are not ignored, as a tensor () on the device of `rows` (N, ...).

    It is float32 (float64 for float64 rows). Nothing waits for the device.
    """
    compute = compute_dtype(rows)
    if spec.labels is None:
        return torch.full((), 1.0 / max(rows.shape[0], 1), dtype=compute, device=rows.device)
    return 1.0 / (spec.labels != spec.options.ignore_index).sum().clamp(min=1).to(compute)


def check_out_like(out: Tensor, logits: Tensor) -> None:
    """Raise TypeError or ValueError if `out` is not a tensor of the logits' shape, dtype and device."""
    check_tensor("logits", logits)
    check_tensor("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, dtype {out.dtype} on {out.device}; it must be like logits: "
            f"{tuple(logits.shape)}, {logits.dtype} on {logits.device}"
        )


def _check_out(out: Tensor, logits: Tensor, inputs: tuple[tuple[str, object], ...]) -> None:
    """Raise if dlogits cannot be written to `out`, or `out` overlaps an input other than the logits as a whole."""
    check_out_like(out, logits)
    strides = out.stride()
    viewable = out.dim() == 2 or out.is_contiguous()
    if (
        not viewable
        or (out.shape[-1] > 1 and strides[-1] != 1)
        or (out.dim() == 2 and out.shape[0] > 1 and strides[0] < out.shape[1])
    ):
        raise ValueError(f"out has strides {strides}; its columns must be adjacent and its rows must not overlap")
    storage = out.untyped_storage().data_ptr()
    if storage == logits.untyped_storage().data_ptr():
        if out.data_ptr() != logits.data_ptr() or strides != logits.stride():
            raise ValueError("out overlaps logits; it must be logits itself or memory of its own")
    for name, x in inputs:
        if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() == storage:
            raise ValueError(f"out shares memory with {name}; it must be logits itself or memory of its own")
