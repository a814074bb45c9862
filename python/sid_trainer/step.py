"""One training step: SID in one pass (`sid_step`), as the public reference does it, and backpropagation.

Source: arXiv 2510.03273. A stage learns from the loss of its own belief p_i against the target y and its prior p_{i-1},

    L_i = alpha * CE(y, p_i) + (1 - alpha) * KL(p_{i-1} || p_i)        p_{i-1} constant, p_0 uniform

and no gradient flows from one stage to the one before it. Every step

- takes inputs (B, ...), targets (B,) integer classes or (B, C) probabilities;
- without optimizers adds to the gradients in `.grad`, as `backward` does, and changes nothing else;
- with optimizers, `[extractor's, stage 1's, ..., stage L's]`, first clears the gradients those own, then also updates
  (`sid_step` also takes `[extractor's, all stages']`, the latter over `stacked_stages(network).parameters()`);
- runs the forward passes under autocast when `dtype` is not float32, and never waits for a device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from sid_kernels import CascadeWeights, local_loss_and_grad, refine_cascade_and_grad

from .network import SIDNetwork, at_least_float32
from .stacked import StackedStages, stacked_stages

Alpha = float | Tensor | Sequence[float | Tensor]  # a 0-d tensor on the device, where a captured graph must change it


class StepResult(NamedTuple):
    stage_loss: Tensor  # (L,) float32 on the network's device; (1,) for backpropagation, whose one loss is the last's
    logits: Tensor  # (B, C) of the last stage, detached, from before any update


def sid_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.5,
    optimizers: Sequence[Optimizer] | None = None,
    *,
    schedule: str = "one-pass",
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Train every stage locally; the extractor receives the sum of the stages' gradients.

    `one-pass`: each stage runs, learns and is updated before the next one runs, and its graph dies at once, so the
    cascade never holds more than one stage's activations. Equal plain stages take `sid_kernels.refine_cascade` instead,
    which gives the same numbers and holds at most 16 MiB (or one stage, if that is more) for them. `two-phase`, the
    paper's letter: a pass without gradients caches the teacher beliefs, then every stage learns from its cached prior.
    The two differ only where a layer draws random numbers or keeps statistics. `alpha` is one number, or one a stage.
    """
    if schedule not in ("one-pass", "two-phase"):
        raise ValueError(f"schedule must be 'one-pass' or 'two-phase', not {schedule!r}")
    alphas, optimizers = per_stage(alpha, network), optimizers or ()
    stacked = stacked_stages(network) if schedule == "one-pass" else None
    at_once = check_optimizers(optimizers, network, stacked)
    clear_gradients(optimizers)
    with autocast(inputs, dtype):
        extracted = network.extractor(inputs)  # (B, D)
    # The extractor's graph ends here; what the stages send back to it is summed in float32, like the beliefs.
    features = at_least_float32(extracted.detach())
    if stacked is not None and features.dtype is torch.float32 and features.dim() == 2:
        losses, logits, dfeatures = all_stages(stacked, features, targets, alphas, optimizers, at_once, dtype)
    else:
        teachers = teacher_beliefs(network, inputs, dtype) if schedule == "two-phase" else None
        losses, logits, dfeatures = stage_by_stage(network, features, targets, alphas, optimizers, teachers, dtype)
    if extracted.requires_grad:
        extracted.backward(dfeatures.to(extracted.dtype))
    if optimizers:
        optimizers[0].step()
    return StepResult(losses, logits)


def stage_by_stage(
    network: SIDNetwork,
    features: Tensor,
    targets: Tensor,
    alphas: Sequence[float | Tensor],
    optimizers: Sequence[Optimizer],
    teachers: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The algorithm, for stages of any kind: stage losses (L,), the last logits (B, C), gradient of the features."""
    features = features.requires_grad_()  # a leaf, whose gradient sums over the stages
    prior, losses = network.uniform(features), []
    for i, stage in enumerate(network.stages):
        with autocast(features, dtype):
            _, logits = stage(features, prior)  # (B, C)
        # p_0 is passed as the tensor the head reads, not as None: the belief comes out in the prior's dtype, float32.
        result, dlogits = local_loss_and_grad(logits, prior, targets, alphas[i])
        logits.backward(dlogits)  # frees this stage's graph; its weights may change from here on
        if optimizers:
            optimizers[1 + i].step()
        losses.append(result.loss)
        prior = teachers[i] if teachers else result.belief
    return torch.stack(losses), logits.detach(), features.grad


def all_stages(
    stacked: StackedStages,
    features: Tensor,
    targets: Tensor,
    alphas: Sequence[float | Tensor],
    optimizers: Sequence[Optimizer],
    at_once: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers for equal plain stages, from one kernel along the cascade and one product for all stages."""
    if any(isinstance(alpha, Tensor) for alpha in alphas):
        alphas = torch.stack([a if isinstance(a, Tensor) else features.new_full((), a) for a in alphas])
    weights = stacked.weights
    if features.is_cuda and dtype is not torch.float32:  # on a CPU the kernel in float32 is the faster one
        features, weights = features.to(dtype), CascadeWeights(*(w.to(dtype) for w in weights))
    out = stacked.gradients if optimizers and weights is stacked.weights else None
    result, dfeatures, gradients = refine_cascade_and_grad(features, weights, targets, alphas, out=out)
    if optimizers:
        if out is None:
            torch._foreach_copy_(list(stacked.gradients), list(gradients))
        stacked.show_gradients()
        if at_once:
            for parameter, gradient in zip(stacked.weights, stacked.gradients, strict=True):
                parameter.grad = gradient
        for optimizer in optimizers[1:]:
            optimizer.step()
    else:
        stacked.add_gradients(gradients)
    return result.stage_loss, result.logits, dfeatures.float()


def reference_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.5,
    optimizers: Sequence[Optimizer] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """SID as the public reference code does it, for comparison: two forward passes, the loss of every stage in plain
    PyTorch, one backward over their sum (which holds the graphs of all stages at once)."""
    alphas, optimizers = per_stage(alpha, network), checked(optimizers, network)
    clear_gradients(optimizers)
    teachers = teacher_beliefs(network, inputs, dtype)
    with autocast(inputs, dtype):
        features = at_least_float32(network.extractor(inputs))
        priors = [network.uniform(features), *teachers[:-1]]
        logits = [stage(features, prior)[1] for stage, prior in zip(network.stages, priors, strict=True)]
    labels = targets if targets.is_floating_point() else F.one_hot(targets, network.num_classes)
    losses = []
    for z, prior, a in zip(logits, priors, alphas, strict=True):
        log_p = F.log_softmax(at_least_float32(z), dim=1)
        fidelity = F.kl_div(log_p, labels.to(log_p.dtype), reduction="batchmean")
        consistency = F.kl_div(log_p, prior, reduction="batchmean")
        losses.append(a * fidelity + (1 - a) * consistency)
    losses = torch.stack(losses)
    losses.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return StepResult(losses.detach(), logits[-1].detach())


def bp_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.5,
    optimizers: Sequence[Optimizer] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Backpropagation of the last stage's cross-entropy through the chain of softmaxes; `alpha` has no meaning here."""
    optimizers = checked(optimizers, network)
    clear_gradients(optimizers)
    with autocast(inputs, dtype):
        logits = network(inputs)
    loss = F.cross_entropy(at_least_float32(logits), targets)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return StepResult(loss.detach().reshape(1), logits.detach())


STEPS = {"sid": sid_step, "reference": reference_step, "bp": bp_step}


@torch.no_grad()
def teacher_beliefs(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The belief (B, C) of every stage, without gradients: stage i+1's prior is entry i."""
    with autocast(inputs, dtype):
        return [at_least_float32(logits).softmax(dim=1) for logits in network.stage_logits(inputs)]


def per_stage(alpha: Alpha, network: SIDNetwork) -> Sequence[float | Tensor]:
    depth = len(network.stages)
    alphas = alpha if isinstance(alpha, Sequence) else [alpha] * depth
    if len(alphas) != depth:
        raise ValueError(f"alpha must be one number or one for each of the {depth} stages, not {len(alphas)}")
    return alphas


def checked(optimizers: Sequence[Optimizer] | None, network: SIDNetwork) -> Sequence[Optimizer]:
    check_optimizers(optimizers or (), network, None)
    return optimizers or ()


def check_optimizers(optimizers: Sequence[Optimizer], network: SIDNetwork, stacked: StackedStages | None) -> bool:
    """Whether there is one for all stages; ValueError unless there is that, or one a stage, or none at all."""
    expected = 1 + len(network.stages)
    if not optimizers:
        return False
    owned = {id(p) for optimizer in optimizers[1:] for group in optimizer.param_groups for p in group["params"]}
    if stacked is not None and len(optimizers) == 2 and owned == {id(p) for p in stacked.weights}:
        return True
    own = {id(p) for p in network.stages.parameters()}
    if len(optimizers) != expected or (own and not owned & own):
        raise ValueError(
            f"optimizers must be one for the extractor and one a stage, {expected}, each over its own parameters (or,"
            " for sid_step one-pass and equal stages, one for the extractor and one over"
            f" stacked_stages(network).parameters()), not {len(optimizers)}"
        )
    return False


def clear_gradients(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def autocast(inputs: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32)
