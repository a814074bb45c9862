"""A belief head (linear layer, softmax, local loss) and all its gradients, with at most one chunk of logits in memory.

The logits of a chunk become their own gradient in place, and the products that need it use it, before the next chunk
takes the memory. A prior that is another head is recomputed in the same way. A Triton kernel that keeps rows of logits
on chip replaces the chunks for few classes on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import without_autocast
from ..core.checks import check_values, debug_enabled
from ..core.options import HALF, LIFT, LossOptions, compute_dtype
from ..core.products import add_product, multiply
from ..local_loss.dispatch import run as run_local_loss
from ..local_loss.problem import LocalLoss, LocalLossProblem, scale_of_mean
from . import triton_launch
from .problem import BeliefHeadProblem, Gradients, LinearLayer, NeedGrad, PriorHead, belief_dtype, make_problem

# Bytes of the logits of a chunk, and of a prior recomputed beside them. Each chunk reads and writes the weight's
# gradient once, so chunks are as large as memory allows. On a CPU, 8 of 64 MiB are for all else.
CHUNK_BYTES = {"cpu": 56 << 20, "cuda": 256 << 20}
# On a GPU, a weight's gradient of 2 to ROUNDINGS chunks is summed in bfloat16: adding products to a float32 sum in
# memory would take longer than the products. Otherwise sums of half precision are in float32.
ROUNDINGS = 8


def solve(
    layer: LinearLayer,
    prior: Tensor | PriorHead | None,
    target: Tensor,
    alpha: float | Tensor,
    options: LossOptions,
    need_belief: bool,
    need: NeedGrad,
    backend: str,
    row_scale: Tensor | None = None,
) -> tuple[LocalLoss, Gradients]:
    """Return the local loss of a head and the gradients in `need`, for the arguments of `fused_belief_head`.

    row_scale: (...), float32, the incoming gradient of each row's loss, for reduction "none". Gradients in half
    precision are returned in float32, to be rounded when the incoming gradient is known.
    """
    problem = make_problem(layer, prior, target, alpha, options, need_belief, need)
    backends.check_name(backend)
    classes = problem.weight.shape[0]
    if problem.hidden.device.type == "cpu" or debug_enabled():
        check_values(problem.spec, classes)
    if row_scale is not None:
        compute = compute_dtype(layer.hidden)
        row_scale = row_scale.reshape(-1).to(compute).contiguous()
    with torch.no_grad(), without_autocast(problem.hidden):
        if backend in ("auto", "triton") and backends.unavailable("triton") is None and triton_launch.takes(problem):
            losses, belief, gradients = _run_on_chip(problem, row_scale)
        else:
            losses, belief, gradients = _run_in_chunks(problem, backend, row_scale)
        shape = layer.hidden.shape
        losses = losses.view(3, *shape[:-1]) if options.reduction == "none" else losses.sum(1)
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=gradients.hidden.view(shape))
    if layer.hidden.dtype in HALF:
        gradients = Gradients(*(None if x is None else x.float() for x in gradients))
    loss, fidelity, consistency = losses.unbind()
    belief = None if belief is None else belief.view(*shape[:-1], classes)
    return LocalLoss(loss, belief, fidelity, consistency), gradients


def rows_at_once(problem: BeliefHeadProblem) -> int:
    """Return the number of rows per chunk: as many as CHUNK_BYTES hold, about equally many in every chunk."""
    rows, classes = problem.hidden.shape[0], problem.weight.shape[0]
    bytes_per_logit = problem.hidden.element_size()
    if isinstance(problem.prior, PriorHead):
        bytes_per_logit += belief_dtype(problem.hidden.dtype, problem.prior, problem.spec.options.reverse).itemsize
    limit = CHUNK_BYTES.get(problem.hidden.device.type, CHUNK_BYTES["cuda"])
    most_rows = max(1, limit // (classes * bytes_per_logit))
    chunks = max(1, -(-rows // most_rows))
    return max(1, -(-rows // chunks))


def _run_on_chip(problem: BeliefHeadProblem, row_scale: Tensor | None) -> tuple[Tensor, Tensor | None, Gradients]:
    """Return losses (3, N), belief and gradients from one kernel and the products that sum over rows."""
    scale, half = None, problem.hidden.dtype in HALF
    if half and problem.spec.options.reduction == "mean":  # 1 / N would round what the kernel writes
        scale = scale_of_mean(problem.spec, problem.hidden)
        problem = problem._replace(spec=problem.spec._replace(options=_options_with(problem, reduction="sum")))
    losses, belief, dlogits, dhidden = triton_launch.run(problem)
    if scale is not None:
        losses *= scale
    if dlogits is None:
        return losses, belief, Gradients(None, None, None)
    if row_scale is not None:
        factor = row_scale[:, None]
        dlogits, dhidden = dlogits * factor, None if dhidden is None else dhidden * factor
    dweight = multiply(dlogits.t(), problem.hidden.to(dlogits.dtype)) if problem.need.weight else None
    dbias = dlogits.sum(0, dtype=torch.float32) if problem.need.bias else None
    gradients = Gradients(dhidden, dweight, dbias)
    if scale is not None:
        gradients = Gradients(*(None if x is None else x.mul_(scale) for x in gradients))
    return losses, belief, gradients


def _run_in_chunks(
    problem: BeliefHeadProblem, backend: str, row_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Return losses (3, N), belief and gradients, chunk by chunk; gradients in half precision are in float32."""
    rows, hidden_dim = problem.hidden.shape
    classes, dtype, need = problem.weight.shape[0], problem.hidden.dtype, problem.need
    mean, reverse = problem.spec.options.reduction == "mean", problem.spec.options.reverse
    new = problem.hidden.new_empty
    scaling = _scaling(problem, row_scale)
    compute = compute_dtype(problem.hidden)
    prior_dtype = belief_dtype(dtype, problem.prior, reverse)
    belief = new(rows, classes, dtype=prior_dtype) if problem.need_belief else None
    losses = new(3, rows, dtype=compute)
    dhidden = new(rows, hidden_dim, dtype=compute) if need.hidden else None
    step = rows_at_once(problem)
    weights = _WeightGradient(problem, scaling, -(-rows // step)) if need.weight else None
    dbias = torch.zeros(classes, dtype=compute, device=problem.hidden.device) if need.bias else None
    logits_memory = new(step, classes)
    prior_memory = new(step if isinstance(problem.prior, PriorHead) else 0, classes, dtype=prior_dtype)
    row_options = _options_with(problem, reduction="none")
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        chunk = problem.rows(part)
        memory = logits_memory[: part.stop - start]
        prior = chunk.prior
        if isinstance(prior, PriorHead):  # its logits use the memory before ours do
            q = prior_memory[: part.stop - start]
            prior = torch.softmax(_linear(*prior, memory), -1, dtype=q.dtype, out=q)
        logits = _linear(chunk.hidden, chunk.weight, chunk.bias, memory)
        incoming = scaling.incoming
        loss = LocalLossProblem(
            logits,
            prior,
            chunk.spec._replace(options=row_options),
            problem.need_grad,
            problem.need_belief,
            out=logits,
            belief_out=None if belief is None else belief[part],
            incoming=incoming if incoming is None or incoming.dim() == 0 else incoming[part],
        )
        outputs = run_local_loss(loss, backend)
        for i, values in enumerate((outputs.loss, outputs.fidelity, outputs.consistency)):
            losses[i, part] = values
        if (dlogits := outputs.dlogits) is None:
            continue
        if dhidden is not None:
            into = dhidden[part]
            if dtype in HALF:
                add_product(into, dlogits, chunk.weight, start=True)
            else:
                torch.addmm(into, dlogits, chunk.weight, beta=0, alpha=scaling.factor, out=into)
        if weights is not None:
            weights.add(dlogits, chunk.hidden)
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=compute)
    if mean:
        losses *= scale_of_mean(problem.spec, problem.hidden) if scaling.mean is None else scaling.mean
    after = scaling.after
    if dhidden is not None and dtype in HALF:
        dhidden *= scaling.factor
    for total in (dhidden, dbias):
        if total is not None and after is not None:
            total *= after
    if dbias is not None:
        dbias *= scaling.factor
    return losses, belief, Gradients(dhidden, None if weights is None else weights.total(), dbias)


class _Scaling(NamedTuple):
    """How the gradients get the factor of the mean and the incoming gradient: the product of three parts."""

    incoming: Tensor | None  # () or (N,): in the logits' gradient, before it is rounded
    factor: float  # of the products
    after: Tensor | None  # (): of the gradients
    mean: float | None  # 1 over the number of rows that count, if it is known on the host


def _scaling(problem: BeliefHeadProblem, row_scale: Tensor | None) -> _Scaling:
    """Return how to scale. In float16 the logits' gradient is lifted by LIFT, out of the range of subnormal numbers."""
    incoming, factor, after, mean = row_scale, 1.0, None, None
    if problem.spec.options.reduction == "mean":
        after = scale_of_mean(problem.spec, problem.hidden)
        if problem.hidden.is_cpu:
            factor, after = float(after), None
            mean = factor
    if problem.hidden.dtype is torch.float16:
        if row_scale is None:
            incoming = torch.full((), LIFT, device=problem.hidden.device)
        elif row_scale.numel():  # a loss scale may exceed the range
            after = row_scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            incoming = row_scale * (LIFT / after)
        factor /= LIFT
    return _Scaling(incoming, factor, after, mean)


def _options_with(problem: BeliefHeadProblem, reduction: str) -> LossOptions:
    """Return the options of a problem with another reduction."""
    return dataclasses.replace(problem.spec.options, reduction=reduction)


class _WeightGradient:
    """The weight's gradient (C, H): the sum over chunks of dlogits^T hidden, scaled."""

    def __init__(self, problem: BeliefHeadProblem, scaling: _Scaling, chunks: int):
        dtype = problem.hidden.dtype
        on_gpu = not problem.hidden.is_cpu
        self.wide = dtype in HALF and not (dtype is torch.bfloat16 and on_gpu and 1 < chunks <= ROUNDINGS)
        kind = torch.float32 if self.wide else dtype
        self.sum = torch.empty(problem.weight.shape, dtype=kind, device=problem.hidden.device)
        self.scaling, self.started = scaling, False
        if not problem.hidden.shape[0]:
            self.sum.zero_()

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add a chunk."""
        if self.wide:
            add_product(self.sum, dlogits.t(), hidden, start=not self.started)
        else:
            torch.addmm(self.sum, dlogits.t(), hidden, beta=int(self.started), alpha=self.scaling.factor, out=self.sum)
        self.started = True

    def total(self) -> Tensor:
        """Return the gradient, in float32 if the hidden is in half precision."""
        if self.wide:
            self.sum *= self.scaling.factor
        if self.scaling.after is not None:
            self.sum *= self.scaling.after
        return self.sum


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write hidden @ weight.T + bias to `out` and return it."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)
