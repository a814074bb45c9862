"""A cascade of equal stages and all its gradients: which backend runs the stages, and the products around them.

What depends on the order of the stages (belief in, hidden, logits, softmax, loss, gradient back to the hidden layer) is
one kernel over tiles of rows. What does not is one product for all stages: the features' part of every first layer
before, the gradients of weights and features after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import backends
from ..core.autograd import without_autocast
from ..core.checks import check_alpha_values, check_values, debug_enabled
from ..core.options import HALF, LossOptions
from ..core.products import multiply
from ..local_loss.problem import scale_of_mean
from . import cpu, reference, triton_launch
from .problem import CascadeOutputs, CascadeProblem, CascadeResult, CascadeWeights, check_weights, make_problem

# Stages run together as long as what they leave for the products stays below this many bytes, so that memory does not
# grow with depth beyond it. The reference network's ten stages (B = 128, H = 256, C = 10) need 2.7 MB, at C = 1000
# 13 MB.
GROUP_BYTES = 16 << 20


def solve(
    features: Tensor,
    weights: CascadeWeights,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor,
    prior: Tensor | None,
    options: LossOptions,
    backend: str,
    need: tuple[bool, bool],
    out: CascadeWeights | None = None,
) -> tuple[CascadeResult, Tensor | None, CascadeWeights | None]:
    """Return the result and the gradients of features and weights, for the arguments of `refine_cascade`.

    need: whether the gradients of the weights are wanted, and with them that of the features. out: memory for the
    gradients of the weights. Without `out`, gradients in half precision are returned in float32, to be rounded when
    the incoming gradient is known.
    """
    need_grad, need_features = need
    problem = make_problem(features, weights, target, alpha, prior, options, need_grad)
    gradients, half = None, problem.features.dtype in HALF
    if need_grad and (out is None or half):
        kind = torch.float32 if half else problem.features.dtype
        gradients = CascadeWeights(*(torch.empty_like(x, dtype=kind) for x in problem.weights))
    if need_grad and out is not None:
        check_weights("out", out, problem.features)
        used = {x.untyped_storage().data_ptr() for x in (features, *weights)}
        for name, x in zip(CascadeWeights._fields, out, strict=True):
            if not x.is_contiguous() or (x.numel() and x.untyped_storage().data_ptr() in used):
                raise ValueError(f"out.{name} must be contiguous and share no memory with weights or features")
        gradients = gradients if half else out
    losses, belief, logits, dfeatures = run(problem, backend, need_features, gradients)
    stage_loss, fidelity, consistency = losses.unbind()
    result = CascadeResult(stage_loss.sum(), belief, fidelity, consistency, stage_loss, logits)
    if out is not None and half and gradients is not None:
        gradients = CascadeWeights(*(x.copy_(y) for x, y in zip(out, gradients, strict=True)))
    return result, dfeatures, out if gradients is None else gradients


def run(
    problem: CascadeProblem, backend: str, need_features: bool, gradients: CascadeWeights | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return losses (3, L), the last stage's belief and logits (B, C), and the gradient of the features (B, D).

    gradients: where those of the weights go, if the problem wants them. They and the last item are in float32 for half
    precision. The last item is None if it is not wanted.
    """
    run_stages = _choose(problem, backend)
    if problem.features.device.type == "cpu" or debug_enabled():
        if run_stages is cpu.run:  # it checks labels itself, before it writes
            check_alpha_values(problem.spec.alpha)
        else:
            check_values(problem.spec, problem.weights.sizes[2])
    stages = problem.weights.sizes[0]
    group = stages_at_once(problem)
    losses, dfeatures, scale = [], None, None
    if problem.need_grad and need_features:
        dfeatures = torch.empty_like(problem.features, dtype=problem.compute_dtype)
    if problem.features.dtype in HALF and problem.spec.options.reduction == "mean":
        # 1 / N would round the gradients of single rows: it multiplies their sums instead
        scale = scale_of_mean(problem.spec, problem.features)
        options = dataclasses.replace(problem.spec.options, reduction="sum")
        problem = problem._replace(spec=problem.spec._replace(options=options))
    with torch.no_grad(), without_autocast(problem.features):
        for first in range(0, stages, group):
            single_group, stage = group == stages, slice(first, first + group)
            part = problem if single_group else _part(problem, stage)
            into = gradients if single_group or gradients is None else _slice(gradients, stage)
            outputs = run_stages(part, into)
            losses.append(outputs.losses)
            if into is not None:
                _write_gradients(part, outputs, into, dfeatures, first > 0)
            belief = outputs.beliefs[-1].clone()  # a view would keep the beliefs of all stages
            logits = outputs.logits
            problem = problem._replace(prior=belief if outputs.last_belief is None else outputs.last_belief)
            del outputs, part  # before the next group takes as much memory
    total = losses[0] if len(losses) == 1 else torch.cat(losses, 1)
    if scale is not None:
        for x in (total, dfeatures, *(gradients or ())):
            if x is not None:
                x *= scale
    return total, belief, logits, dfeatures


def stages_at_once(problem: CascadeProblem) -> int:
    """Return the number of stages per group: all of them, unless they hold more than GROUP_BYTES."""
    held = bytes_of_a_stage(problem.weights, problem.features.shape[0])
    return max(1, min(problem.weights.sizes[0], GROUP_BYTES // max(held, 1)))


def bytes_of_a_stage(weights: CascadeWeights, rows: int) -> int:
    """Return the bytes of a stage's hidden, belief and the gradients of both layers' outputs."""
    _, hidden_dim, classes = weights.sizes
    return rows * 2 * (hidden_dim + classes) * weights.hidden_weight.element_size()


def bytes_of_a_group(weights: CascadeWeights, rows: int) -> int:
    """Return the most bytes that a cascade's stages hold at once."""
    held = bytes_of_a_stage(weights, rows)
    return held * max(1, min(weights.sizes[0], GROUP_BYTES // max(held, 1)))


def _choose(problem: CascadeProblem, backend: str) -> Callable[[CascadeProblem, CascadeWeights | None], CascadeOutputs]:
    """Return what runs the stages: a kernel that takes the whole cascade, or one stage after another on `backend`."""
    backends.check_name(backend)
    if backend in ("auto", "cpu") and cpu.takes(problem):
        return cpu.run
    if backend in ("auto", "triton") and backends.unavailable("triton") is None and triton_launch.takes(problem):
        return lambda part, gradients: triton_launch.run(part)
    return lambda part, gradients: reference.run(part, backend)


def _slice(weights: CascadeWeights, part: slice) -> CascadeWeights:
    return CascadeWeights(*(x[part] for x in weights))


def _part(problem: CascadeProblem, part: slice) -> CascadeProblem:
    """Return the problem of some of the stages."""
    spec = problem.spec
    spec = spec if isinstance(spec.alpha, float) else spec._replace(alpha=spec.alpha[part])
    return problem._replace(weights=_slice(problem.weights, part), spec=spec)


def _write_gradients(
    problem: CascadeProblem, outputs: CascadeOutputs, into: CascadeWeights, dfeatures: Tensor | None, add: bool
) -> None:
    """Write the gradients of the weights, and write or `add` that of the features (B, D)."""
    if problem.features.dtype in HALF:
        return _write_wide(problem, outputs, into, dfeatures, add)
    assert outputs.activations is not None
    stages, hidden_dim, classes = problem.weights.sizes
    features, (dlogits, hidden, dhidden) = problem.features, outputs.activations
    rows = features.shape[0]
    torch.bmm(dlogits.transpose(1, 2), hidden, out=into.logits_weight)
    if not outputs.has_biases:
        torch.sum(dlogits, 1, out=into.logits_bias)
        torch.sum(dhidden, 1, out=into.hidden_bias)
    by_features = into.hidden_weight.view(stages * hidden_dim, -1)[:, classes:]  # (L * H, D)
    torch.mm(dhidden.transpose(1, 2).reshape(stages * hidden_dim, rows), features, out=by_features)
    by_belief = into.hidden_weight[:, :, :classes]
    if problem.prior is None:  # 1 / C in every row
        by_belief[0] = into.hidden_bias[0].unsqueeze(1) / classes
    else:
        torch.mm(dhidden[0].t(), problem.prior.to(features.dtype), out=by_belief[0])
    if stages > 1:
        torch.bmm(dhidden[1:].transpose(1, 2), outputs.beliefs[:-1], out=by_belief[1:])
    if dfeatures is not None:
        side_by_side = dhidden.transpose(0, 1).reshape(rows, stages * hidden_dim)
        feature_part = problem.weights.hidden_weight.view(stages * hidden_dim, -1)[:, classes:]  # (L * H, D)
        torch.addmm(dfeatures, side_by_side, feature_part, beta=int(add), out=dfeatures)  # beta 0: nothing is read


def _write_wide(
    problem: CascadeProblem, outputs: CascadeOutputs, into: CascadeWeights, dfeatures: Tensor | None, add: bool
) -> None:
    """Write or `add` the same gradients for a problem in half precision, in float32."""
    assert outputs.activations is not None
    stages, hidden_dim, classes = problem.weights.sizes
    lift, features, (dlogits, hidden, dhidden) = outputs.lift, problem.features, outputs.activations
    rows = features.shape[0]
    into.logits_weight.copy_(multiply(dlogits.transpose(1, 2), hidden))
    torch.sum(dlogits, 1, dtype=torch.float32, out=into.logits_bias)
    torch.sum(dhidden, 1, dtype=torch.float32, out=into.hidden_bias)
    side_by_side = dhidden.transpose(0, 1).reshape(rows, stages * hidden_dim)
    into.hidden_weight[:, :, classes:].view(stages * hidden_dim, -1).copy_(multiply(side_by_side.t(), features))
    by_belief = into.hidden_weight[:, :, :classes]
    if problem.prior is None:  # 1 / C in every row
        by_belief[0] = into.hidden_bias[0].unsqueeze(1) / classes
    else:
        by_belief[0] = multiply(dhidden[0].t(), problem.prior.to(features.dtype))
    if stages > 1:
        by_belief[1:] = multiply(dhidden[1:].transpose(1, 2), outputs.beliefs[:-1])
    if lift != 1.0:
        for x in into:
            x /= lift
    if dfeatures is not None:
        feature_part = problem.weights.hidden_weight.view(stages * hidden_dim, -1)[:, classes:]  # (L * H, D)
        product = multiply(side_by_side, feature_part).div_(lift)
        dfeatures.add_(product) if add else dfeatures.copy_(product)
