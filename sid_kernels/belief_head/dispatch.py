"""A belief head (linear layer, softmax, local loss) and all its gradients, with at most one chunk of logits in memory.

The logits of a chunk become their own gradient in place, and the products that need it use it, before the next chunk
takes the memory. A prior that is another head is recomputed in the same way. A Triton kernel that keeps rows of logits
on chip replaces the chunks for few classes on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import without_autocast
from ..core.checks import check_values, debug_enabled
from ..core.options import LossOptions
from ..local_loss.dispatch import run as run_local_loss
from ..local_loss.problem import LocalLoss, LocalLossProblem, scale_of_mean
from . import triton_launch
from .problem import BeliefHeadProblem, Gradients, LinearLayer, PriorHead, Wanted, belief_dtype, make_problem

# Bytes of the logits of a chunk, and of a prior recomputed beside them. Each chunk reads and writes the weight's
# gradient once, so chunks are as large as memory allows. CPU: what remains of 64 MiB beside it.
CHUNK_BYTES = {"cpu": 56 << 20, "cuda": 256 << 20}
# Up to this many chunks the weight's gradient is summed in bfloat16, with as many roundings; beyond, in float32. For
# float16, whose range a sum may exceed, always in float32.
ROUNDINGS = 8
WIDE_BYTES = 16 << 20  # of a product before it is added to a float32 sum


def solve(
    layer: LinearLayer,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor,
    options: LossOptions,
    need_belief: bool,
    need: Wanted,
    backend: str,
    row_scale: Tensor | None = None,
) -> tuple[LocalLoss, Gradients]:
    """Return the local loss of a head and the gradients in `need`, for the arguments of `fused_belief_head`.

    row_scale: (...), float32, the incoming gradient of each row's loss, for reduction "none".
    """
    problem = make_problem(layer, prior, target, alpha, options, need_belief, need)
    backends.check_name(backend)
    classes = problem.weight.shape[0]
    if problem.hidden.device.type == "cpu" or debug_enabled():
        check_values(problem.spec, classes)
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    with torch.no_grad(), without_autocast(problem.hidden):
        if backend in ("auto", "triton") and backends.unavailable("triton") is None and triton_launch.takes(problem):
            losses, belief, gradients = _run_on_chip(problem, row_scale)
        else:
            losses, belief, gradients = _run_in_chunks(problem, backend, row_scale)
        shape = layer.hidden.shape
        losses = losses.view(3, *shape[:-1]) if options.reduction == "none" else losses.sum(1)
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=gradients.hidden.view(shape))
    loss, fidelity, consistency = losses.unbind()
    belief = None if belief is None else belief.view(*shape[:-1], classes)
    return LocalLoss(loss, belief, fidelity, consistency), gradients


def rows_at_once(problem: BeliefHeadProblem) -> int:
    """Return the number of rows per chunk: as many as CHUNK_BYTES hold, about equally many in every chunk."""
    rows, classes = problem.hidden.shape[0], problem.weight.shape[0]
    held = problem.hidden.element_size()
    if isinstance(problem.prior, PriorHead):
        held += belief_dtype(problem.hidden.dtype, problem.prior, problem.spec.options.reverse).itemsize
    limit = CHUNK_BYTES.get(problem.hidden.device.type, CHUNK_BYTES["cuda"])
    most = max(1, limit // (classes * held))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _run_on_chip(problem: BeliefHeadProblem, row_scale: Tensor | None) -> tuple[Tensor, Tensor | None, Gradients]:
    """Return losses (3, N), belief and gradients from one kernel and the products that sum over rows."""
    losses, belief, dlogits, dhidden = triton_launch.run(problem)
    if dlogits is None:
        return losses, belief, Gradients(None, None, None)
    if row_scale is not None:
        factor = row_scale[:, None].to(dlogits.dtype)
        dlogits, dhidden = dlogits * factor, None if dhidden is None else dhidden * factor
    dweight = dlogits.t() @ problem.hidden if problem.need.weight else None
    dbias = dlogits.sum(0) if problem.need.bias else None
    return losses, belief, Gradients(dhidden, dweight, dbias)


def _run_in_chunks(
    problem: BeliefHeadProblem, backend: str, row_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Return losses (3, N), belief and gradients, chunk by chunk."""
    rows, hidden_dim = problem.hidden.shape
    classes, dtype, need = problem.weight.shape[0], problem.hidden.dtype, problem.need
    mean, reverse = problem.spec.options.reduction == "mean", problem.spec.options.reverse
    new = problem.hidden.new_empty
    factor, scale = 1.0, row_scale  # of the gradients: a number that products multiply by, and a tensor () or (N,)
    if mean:
        scale = scale_of_mean(problem.spec, problem.hidden)
        if problem.hidden.device.type == "cpu":
            factor, scale = float(scale), None
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    prior_dtype = belief_dtype(dtype, problem.prior, reverse)
    belief = new(rows, classes, dtype=prior_dtype) if problem.need_belief else None
    losses = new(3, rows, dtype=compute)
    dhidden = new(rows, hidden_dim) if need.hidden else None
    step = rows_at_once(problem)
    weights = _WeightGradient(problem, factor, scale, -(-rows // step)) if need.weight else None
    dbias = torch.zeros(classes, dtype=compute, device=problem.hidden.device) if need.bias else None
    logits_memory = new(step, classes)
    prior_memory = new(step if isinstance(problem.prior, PriorHead) else 0, classes, dtype=prior_dtype)
    row_options = dataclasses.replace(problem.spec.options, reduction="none")
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        chunk = problem.rows(part)
        memory = logits_memory[: part.stop - start]
        prior = chunk.prior
        if isinstance(prior, PriorHead):  # its logits use the memory of ours first
            q = prior_memory[: part.stop - start]
            prior = torch.softmax(_linear(*prior, memory), -1, dtype=q.dtype, out=q)
        logits = _linear(chunk.hidden, chunk.weight, chunk.bias, memory)
        loss = LocalLossProblem(
            logits,
            prior,
            chunk.spec._replace(options=row_options),
            problem.need_grad,
            problem.need_belief,
            out=logits,
            belief_out=None if belief is None else belief[part],
        )
        outputs = run_local_loss(loss, backend)
        for i, values in enumerate((outputs.loss, outputs.fidelity, outputs.consistency)):
            losses[i, part] = values
        if (dlogits := outputs.dlogits) is None:
            continue
        row_factor = scale if scale is None or scale.dim() == 0 else scale[part, None]
        if dhidden is not None:
            into = dhidden[part]
            torch.addmm(into, dlogits, chunk.weight, beta=0, alpha=factor, out=into)
            if row_factor is not None:
                into *= row_factor
        if weights is not None:
            weights.add(dlogits, chunk.hidden, row_factor)
        if dbias is not None:
            if row_scale is None:
                dbias += dlogits.sum(0, dtype=compute)
            else:
                dbias += (row_scale[None, part].to(dtype) @ dlogits)[0]
    if mean:
        for total in (losses, dbias):
            if total is not None:
                total *= factor if scale is None else scale
    dbias = None if dbias is None else dbias.to(dtype)
    return losses, belief, Gradients(dhidden, None if weights is None else weights.total(), dbias)


class _WeightGradient:
    """The weight's gradient (C, H): factor times the sum over chunks of dlogits^T (scale * hidden)."""

    def __init__(self, problem: BeliefHeadProblem, factor: float, scale: Tensor | None, chunks: int):
        dtype = problem.hidden.dtype
        self.wide = chunks > 1 and (dtype is torch.float16 or (dtype is torch.bfloat16 and chunks > ROUNDINGS))
        make = torch.zeros if self.wide else torch.empty
        self.sum = make(problem.weight.shape, dtype=torch.float32 if self.wide else dtype, device=problem.hidden.device)
        self.dtype, self.started, self.factor = dtype, False, factor
        # One factor for all rows multiplies the complete float32 sum, which is rounded anyway.
        self.after = scale if self.wide and scale is not None and scale.dim() == 0 else None
        if not problem.hidden.shape[0]:
            self.sum.zero_()

    def add(self, dlogits: Tensor, hidden: Tensor, scale: Tensor | None) -> None:
        """Add a chunk; scale: None, () or (rows, 1)."""
        if scale is not None and self.after is None:
            hidden = (hidden * scale).to(self.dtype)
        if self.wide:
            block = max(1, WIDE_BYTES // (hidden.shape[1] * hidden.element_size()))
            for start in range(0, dlogits.shape[1], block):
                classes = slice(start, start + block)
                # A mean over the chunk stays within float16's range; a sum might not.
                product = torch.empty_like(self.sum[classes], dtype=self.dtype)
                torch.addmm(product, dlogits[:, classes].t(), hidden, beta=0, alpha=1 / len(hidden), out=product)
                self.sum[classes].add_(product, alpha=len(hidden))
        else:
            torch.addmm(self.sum, dlogits.t(), hidden, beta=int(self.started), alpha=self.factor, out=self.sum)
        self.started = True

    def total(self) -> Tensor:
        """Return the gradient in the weight's dtype."""
        if not self.wide:
            return self.sum
        self.sum *= self.factor if self.after is None else self.after
        return self.sum.to(self.dtype)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write hidden @ weight.T + bias to `out` and return it."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
