"""A belief head (linear layer, softmax, local loss) and all its gradients, with at most one chunk of logits alive.

A chunk's logits are computed, turned into their own gradient in place, and used up by the products that need them,
before the next chunk's take their memory. A prior that is another head is recomputed the same way. Where a kernel keeps
a row of logits on chip (few classes, on a GPU), it takes the place of the chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import without_autocast
from ..core.checks import check_alpha_values, check_labels, debug_enabled
from ..local_loss.dispatch import run as run_local_loss
from ..local_loss.problem import LocalLoss, Problem, scale_of_mean
from . import triton_launch
from .problem import HeadProblem, PriorHead, belief_dtype, make_head

# Bytes of logits, and of a prior recomputed beside them, that are alive at a time. The weight's gradient is read and
# written once a chunk, so chunks are as large as memory allows. CPU: what is left of 64 MiB beside it.
CHUNK_BYTES = {"cpu": 56 << 20, "cuda": 256 << 20}
# Up to so many chunks the weight's gradient is summed in bfloat16: as many roundings. Beyond, and for float16, whose
# range a sum may leave, in float32.
ROUNDINGS = 8
WIDE_BYTES = 16 << 20  # of a product on its way into a float32 sum


class Gradients(NamedTuple):
    """Of the parts of a head; None: not wanted."""

    hidden: Tensor | None  # (..., H)
    weight: Tensor | None  # (C, H)
    bias: Tensor | None  # (C,)


def solve(hidden, weight, bias, prior, target, alpha, options, need_belief, need, backend, row_scale=None):
    """Arguments -> (LocalLoss, Gradients). `options` as `make_head` takes them.

    need: which of hidden, weight and bias want their gradient. row_scale (...), float32: each row's weight in them, for
    reduction "none".
    """
    problem = make_head(hidden, weight, bias, prior, target, alpha, *options, need_belief, any(need), need[0])
    backends.check_name(backend)
    if problem.hidden.device.type == "cpu" or debug_enabled():
        check_alpha_values(problem.alpha)
        if problem.labels is not None:
            check_labels(problem.labels, problem.weight.shape[0], problem.ignore_index)
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    with torch.no_grad(), without_autocast(problem.hidden):
        if backend in ("auto", "triton") and backends.unavailable("triton") is None and triton_launch.takes(problem):
            losses, belief, gradients = _on_chip(problem, need, row_scale)
        else:
            losses, belief, gradients = _in_chunks(problem, need, backend, row_scale)
        rows = hidden.shape[:-1]
        losses = losses.view(3, *rows) if problem.reduction == "none" else losses.sum(1)
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=gradients.hidden.view(hidden.shape))
    belief = None if belief is None else belief.view(*rows, problem.weight.shape[0])
    loss, fidelity, consistency = losses.unbind()
    return LocalLoss(loss, belief, fidelity, consistency), gradients


def rows_at_once(problem: HeadProblem) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES hold, and about equally many in every chunk."""
    rows, classes = problem.hidden.shape[0], problem.weight.shape[0]
    held = problem.hidden.element_size()
    if isinstance(problem.prior, PriorHead):
        held += belief_dtype(problem.hidden.dtype, problem.prior, problem.reverse).itemsize
    limit = CHUNK_BYTES.get(problem.hidden.device.type, CHUNK_BYTES["cuda"])
    most = max(1, limit // (classes * held))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _on_chip(problem: HeadProblem, need: tuple[bool, bool, bool], row_scale: Tensor | None):
    """Few classes on a GPU: one kernel for all but the sums over rows."""
    done = triton_launch.run(problem if problem.reduction != "none" else problem._replace(reduction="sum"))
    dlogits, dhidden = done.dlogits, done.dhidden
    if row_scale is not None:
        factor = row_scale[:, None].to(dlogits.dtype)
        dlogits, dhidden = dlogits * factor, None if dhidden is None else dhidden * factor
    dweight = dlogits.t() @ problem.hidden if need[1] else None
    dbias = dlogits.sum(0) if need[2] else None
    return done.losses, done.belief, Gradients(dhidden, dweight, dbias)


def _in_chunks(problem: HeadProblem, need: tuple[bool, bool, bool], backend: str, row_scale: Tensor | None):
    rows, width = problem.hidden.shape
    classes, dtype = problem.weight.shape[0], problem.hidden.dtype
    new = problem.hidden.new_empty
    factor, scale = 1.0, row_scale  # a number that products take along, and a tensor (), (N,) or None
    if problem.reduction == "mean":
        scale = scale_of_mean(problem.labels, problem.ignore_index, problem.hidden)
        if problem.hidden.device.type == "cpu":
            factor, scale = float(scale), None
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    belief = (
        new(rows, classes, dtype=belief_dtype(dtype, problem.prior, problem.reverse)) if problem.need_belief else None
    )
    losses = new(3, rows, dtype=compute)
    dhidden = new(rows, width) if need[0] else None
    step = rows_at_once(problem)
    weights = _WeightGradient(problem, factor, scale, -(-rows // step)) if need[1] else None
    dbias = torch.zeros(classes, dtype=compute, device=problem.hidden.device) if need[2] else None
    logits_memory = new(step, classes)
    prior_memory = None
    if isinstance(problem.prior, PriorHead):
        prior_memory = new(step, classes, dtype=belief_dtype(dtype, problem.prior, problem.reverse))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        chunk = problem.rows(part)
        prior = chunk.prior
        memory = logits_memory[: part.stop - start]
        if isinstance(prior, PriorHead):  # its logits pass through the memory of ours
            logits = _linear(*prior, memory)
            q = prior_memory[: part.stop - start]
            prior = torch.softmax(logits, -1, dtype=q.dtype, out=q)
        logits = _linear(chunk.hidden, chunk.weight, chunk.bias, memory)
        result = run_local_loss(
            Problem(
                logits, prior, chunk.labels, chunk.soft, chunk.alpha, chunk.reverse, chunk.label_smoothing,
                chunk.ignore_index, "none", logits, problem.need_grad,
                need_belief=problem.need_belief, belief_out=None if belief is None else belief[part],
            ),
            backend,
        )  # fmt: skip
        for i, values in enumerate((result.loss, result.fidelity, result.consistency)):
            losses[i, part] = values
        if not problem.need_grad:
            continue
        dlogits = result.dlogits
        own_scale = scale if scale is None or scale.dim() == 0 else scale[part, None]
        if dhidden is not None:
            into = dhidden[part]
            torch.addmm(into, dlogits, chunk.weight, beta=0, alpha=factor, out=into)
            if own_scale is not None:
                into *= own_scale
        if weights is not None:
            weights.add(dlogits, chunk.hidden, own_scale)
        if dbias is not None:
            if row_scale is None:
                dbias += dlogits.sum(0, dtype=compute)
            else:
                dbias += (row_scale[None, part].to(dtype) @ dlogits)[0]
    if row_scale is None:
        for total in (losses, dbias):
            if total is not None and problem.reduction == "mean":
                total *= factor if scale is None else scale
    dbias = None if dbias is None else dbias.to(dtype)
    return losses, belief, Gradients(dhidden, None if weights is None else weights.total(), dbias)


class _WeightGradient:
    """dL/dW = factor * sum over chunks of dlogits^T (scale * hidden), (C, H)."""

    def __init__(self, problem: HeadProblem, factor: float, scale: Tensor | None, chunks: int):
        dtype = problem.hidden.dtype
        self.wide = chunks > 1 and (dtype is torch.float16 or (dtype is torch.bfloat16 and chunks > ROUNDINGS))
        make = torch.zeros if self.wide else torch.empty
        self.sum = make(problem.weight.shape, dtype=torch.float32 if self.wide else dtype, device=problem.hidden.device)
        self.dtype, self.begun, self.factor = dtype, False, factor
        # One factor for all rows waits until the sum is complete, where that costs nothing: it is rounded anyway.
        self.after = scale if self.wide and scale is not None and scale.dim() == 0 else None
        if not problem.hidden.shape[0]:
            self.sum.zero_()

    def add(self, dlogits: Tensor, hidden: Tensor, scale: Tensor | None) -> None:
        if scale is not None and self.after is None:
            hidden = (hidden * scale).to(self.dtype)
        if self.wide:
            block = max(1, WIDE_BYTES // (hidden.shape[1] * hidden.element_size()))
            for start in range(0, dlogits.shape[1], block):
                classes = slice(start, start + block)
                # As a mean over the chunk, whatever the rows: a sum might leave float16's range.
                product = torch.empty_like(self.sum[classes], dtype=self.dtype)
                torch.addmm(product, dlogits[:, classes].t(), hidden, beta=0, alpha=1 / len(hidden), out=product)
                self.sum[classes].add_(product, alpha=len(hidden))
        else:
            torch.addmm(self.sum, dlogits.t(), hidden, beta=int(self.begun), alpha=self.factor, out=self.sum)
        self.begun = True

    def total(self) -> Tensor:
        if not self.wide:
            return self.sum
        self.sum *= self.factor if self.after is None else self.after
        return self.sum.to(self.dtype)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
