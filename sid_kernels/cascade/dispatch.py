"""A cascade of equal stages and all its gradients: which backend runs along the cascade, and the products around it.

What runs along the cascade (belief in, hidden, logits, softmax, loss, gradient back to the hidden layer) is one kernel
over tiles of rows. What does not depend on the order of the stages is one product for all of them: the features' part
of every first layer before, the gradients of weights and features after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import without_autocast
from ..core.checks import check_alpha_values, check_labels, debug_enabled
from . import cpu, reference, triton_launch
from .problem import CascadePass, CascadeProblem, CascadeResult, CascadeWeights, check_weights, make_cascade

# Stages run together as long as what they leave for the products stays below this, so that memory does not grow with
# depth beyond it. The reference network's ten stages (B = 128, H = 256, C = 10) need 2.7 MB of it, at C = 1000 13 MB.
GROUP_BYTES = 16 << 20


def solve(features, weights, target, alpha, prior, options, backend, need_grad, need_features, out):
    """Arguments (`options` as `make_cascade` takes them) -> (CascadeResult, dfeatures, gradients of the weights)."""
    problem = make_cascade(features, weights, target, alpha, prior, *options, need_grad)
    if need_grad and out is None:
        out = CascadeWeights(*(torch.empty_like(x) for x in problem.weights))
    elif need_grad:
        check_weights("out", out, problem.features)
        taken = {x.untyped_storage().data_ptr() for x in (features, *weights)}
        for name, x in zip(CascadeWeights._fields, out, strict=True):
            if not x.is_contiguous() or (x.numel() and x.untyped_storage().data_ptr() in taken):
                raise ValueError(f"out.{name} must be contiguous and share no memory with weights or features")
    losses, belief, logits, dfeatures = run(problem, backend, need_features, out)
    stage_loss, fidelity, consistency = losses.unbind()
    result = CascadeResult(stage_loss.sum(), stage_loss, fidelity, consistency, belief, logits)
    return result, dfeatures, out


def run(
    problem: CascadeProblem, backend: str, need_features: bool, gradients: CascadeWeights | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fills `gradients` (like the weights), where the problem wants any. Returns the losses (3, L), the last stage's
    belief and logits (B, C), and the gradient of the features (B, D) where it is wanted."""
    along = _choose(problem, backend)
    if problem.features.device.type == "cpu" or debug_enabled():
        check_alpha_values(problem.alpha)
        if problem.labels is not None and along is not cpu.run:  # which looks itself, before it writes
            check_labels(problem.labels, problem.weights.sizes[2], problem.ignore_index)
    stages = problem.weights.sizes[0]
    group = stages_at_once(problem)
    losses, dfeatures = [], torch.empty_like(problem.features) if problem.need_grad and need_features else None
    with torch.no_grad(), without_autocast(problem.features):
        for first in range(0, stages, group):
            part = problem if group == stages else _part(problem, slice(first, first + group))
            into = gradients if group == stages or gradients is None else _slice(gradients, slice(first, first + group))
            done = along(part, into)
            losses.append(done.losses)
            if problem.need_grad:
                _products(part, done, into, dfeatures, first > 0)
            belief = done.beliefs[-1].clone()  # a view would keep the beliefs of all stages
            logits = done.logits
            problem = problem._replace(prior=belief if done.carry is None else done.carry)
            del done, part  # before the next group takes as much memory
    return losses[0] if len(losses) == 1 else torch.cat(losses, 1), belief, logits, dfeatures


def stages_at_once(problem: CascadeProblem) -> int:
    """How many stages are in one group: all of them, unless what they hold passes GROUP_BYTES."""
    held = bytes_of_a_stage(problem.weights, *problem.features.shape[:1])
    return max(1, min(problem.weights.sizes[0], GROUP_BYTES // max(held, 1)))


def bytes_of_a_stage(weights: CascadeWeights, rows: int) -> int:
    """What a stage leaves for the products: hidden, belief and the gradients of both layers' outputs."""
    _, width, classes = weights.sizes
    return rows * 2 * (width + classes) * weights.hidden_weight.element_size()


def bytes_of_a_group(weights: CascadeWeights, rows: int) -> int:
    """The most that a cascade's stages hold at once."""
    held = bytes_of_a_stage(weights, rows)
    return held * max(1, min(weights.sizes[0], GROUP_BYTES // max(held, 1)))


def _choose(problem: CascadeProblem, backend: str):
    """What runs along the cascade: a kernel that takes all of it, or its stages one by one, on that backend's loss."""
    backends.check_name(backend)
    if backend in ("auto", "cpu") and cpu.takes(problem):
        return cpu.run
    if backend in ("auto", "triton") and backends.unavailable("triton") is None and triton_launch.takes(problem):
        return lambda part, into: triton_launch.run(part)
    return lambda part, into: reference.run(part, backend)


def _slice(weights: CascadeWeights, part: slice) -> CascadeWeights:
    return CascadeWeights(*(x[part] for x in weights))


def _part(problem: CascadeProblem, part: slice) -> CascadeProblem:
    alpha = problem.alpha if isinstance(problem.alpha, float) else problem.alpha[part]
    return problem._replace(weights=_slice(problem.weights, part), alpha=alpha)


def _products(
    problem: CascadeProblem, done: CascadePass, into: CascadeWeights, dfeatures: Tensor | None, add: bool
) -> None:
    """The gradients of weights and, added up over groups, of the features: sums over rows and stages, as products."""
    stages, width, classes = problem.weights.sizes
    features, hidden, dhidden, dlogits = problem.features, done.hidden, done.dhidden, done.dlogits
    rows = features.shape[0]
    torch.bmm(dlogits.transpose(1, 2), hidden, out=into.logits_weight)
    if not done.has_biases:
        torch.sum(dlogits, 1, out=into.logits_bias)
        torch.sum(dhidden, 1, out=into.hidden_bias)
    by_features = into.hidden_weight.view(stages * width, -1)[:, classes:]  # (L * H, D)
    torch.mm(dhidden.transpose(1, 2).reshape(stages * width, rows), features, out=by_features)
    by_belief = into.hidden_weight[:, :, :classes]
    if problem.prior is None:  # every row's is 1 / C
        by_belief[0] = into.hidden_bias[0].unsqueeze(1) / classes
    else:
        torch.mm(dhidden[0].t(), problem.prior.to(features.dtype), out=by_belief[0])
    if stages > 1:
        torch.bmm(dhidden[1:].transpose(1, 2), done.beliefs[:-1], out=by_belief[1:])
    if dfeatures is not None:
        side_by_side = dhidden.transpose(0, 1).reshape(rows, stages * width)
        feature_part = problem.weights.hidden_weight.view(stages * width, -1)[:, classes:]  # (L * H, D)
        torch.addmm(dfeatures, side_by_side, feature_part, beta=int(add), out=dfeatures)  # beta 0: nothing is read
