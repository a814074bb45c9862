"""The SID step: every stage of a network learns from its own loss, and no gradient crosses stages.

Source: arXiv 2510.03273. A stage learns from the loss of its own belief p_i against the target y and its prior p_{i-1},

    L_i = alpha * CE(y, p_i) + (1 - alpha) * KL(p_{i-1} || p_i)        p_{i-1} constant, p_0 uniform

The step

- takes inputs (B, ...), targets (B,) integer classes or (B, C) probabilities;
- without optimizers adds to the gradients in `.grad`, as `backward` does, and changes nothing else;
- with optimizers, `[extractor's, stage 1's, ..., stage L's]`, first clears the gradients those own, then also updates
  (or `[extractor's, all stages']`, the latter over `stacked_stages(network).parameters()`); an extractor without
  parameters has None;
- runs the forward passes under autocast when `dtype` is not float32, and never waits for a device.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from sid_kernels import CascadeWeights, fused_local_loss, local_loss_and_grad, refine_cascade_and_grad

from ..network.modules import SIDNetwork, at_least_float32
from .stacked import StackedStages, stacked_stages
from .streams import InTurn, StageStreams

Alpha = float | Tensor | Sequence[float | Tensor]  # a 0-d tensor on the device, where a captured graph must change it
Optimizers = Sequence[Optimizer | None]
SCHEDULES = ("one-pass", "two-phase", "reference")


class StepResult(NamedTuple):
    stage_loss: Tensor  # (L,) float32 on the network's device; (1,) for backpropagation, whose one loss is the last's
    logits: Tensor  # (B, C) of the last stage, detached, from before any update


def sid_step(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.5,
    optimizers: Optimizers | None = None,
    *,
    schedule: str = "one-pass",
    fused: bool = True,
    divergence: str = "forward",
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
    streams: StageStreams | None = None,
) -> StepResult:
    """Train every stage locally; an extractor receives the sum of the stages' gradients.

    `one-pass`: each stage runs, learns and is updated before the next one runs, and its graph dies at once, so the
    cascade never holds more than one stage's activations. Equal plain stages take `sid_kernels.refine_cascade` instead,
    unless `fused` forbids it: the same numbers sooner, and at most 16 MiB (or one stage, if that is more) held.
    `two-phase`, the paper's letter: a pass without gradients caches the teacher beliefs, then every stage learns from
    its cached prior. `reference`, as the public code does it, for comparison: the two phases, but one backward over the
    sum of all losses, which holds the graphs of all stages at once. On deterministic stages all three give the same
    gradients; they differ where a layer draws random numbers or keeps statistics.

    `alpha` is one number, or one a stage. `divergence` and `label_smoothing` are those of `local_loss_and_grad`. With
    `streams`, stages that are run one by one run on a stream each (on a GPU).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    alphas, optimizers = per_stage(alpha, network), optimizers or ()
    loss = {"divergence": divergence, "label_smoothing": label_smoothing}
    if schedule == "reference":
        return summed_losses(network, inputs, targets, alphas, optimizers, loss, dtype)
    stacked = stacked_stages(network) if fused and schedule == "one-pass" else None
    at_once = check_optimizers(optimizers, network, stacked)
    clear_gradients(optimizers)
    with autocast(inputs, dtype):
        extracted = network.extractor(inputs)
    # The extractor's graph ends here; what the stages send back to it is summed in float32, like the beliefs.
    features = at_least_float32(extracted.detach())
    if stacked is not None and features.dtype is torch.float32 and features.dim() == 2:
        losses, logits, dfeatures = all_stages(stacked, features, targets, alphas, optimizers, at_once, loss, dtype)
    else:
        features.requires_grad_(extracted.requires_grad)  # a leaf, whose gradient sums over the stages that read it
        teachers = teacher_beliefs(network, inputs, dtype) if schedule == "two-phase" else None
        losses, logits = stage_by_stage(network, features, targets, alphas, optimizers, teachers, loss, dtype, streams)
        dfeatures = features.grad
    if extracted.requires_grad:
        extracted.backward(dfeatures.to(extracted.dtype))
    update(optimizers[:1])
    return StepResult(losses, logits)


def stage_by_stage(
    network: SIDNetwork,
    features: Tensor,
    targets: Tensor,
    alphas: Sequence[float | Tensor],
    optimizers: Optimizers,
    teachers: Sequence[Tensor] | None,
    loss: dict,
    dtype: torch.dtype,
    streams: InTurn | None = None,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The algorithm, for stages of any kind: stage losses (L,) and the last logits (B, C). `prior` (B, C) is the belief
    the first of them reads, uniform unless stages elsewhere came before."""
    prior, losses = network.uniform(features) if prior is None else prior, []
    streams = streams or InTurn()
    summing = features.requires_grad and get_gradient_edge(features)  # adds up their gradients, on this stream
    streams.begin()
    for i, stage in enumerate(network.stages):
        with streams.stage(i):  # after what the stage before it hands on, not after its backward and update
            with autocast(features, dtype):
                seen, logits = stage(features, prior)  # the features it made, (B, C)
            # p_0 is passed as the tensor the head reads, not None: the belief comes out in the prior's dtype, float32.
            result, dlogits = local_loss_and_grad(logits, prior, targets, alphas[i], **loss)
            streams.hand_on(seen, result.belief)
            logits.backward(dlogits)  # frees this stage's graph; its weights may change from here on
            streams.learn(partial(update, optimizers[1 + i : 2 + i]))
        losses.append(result.loss)
        prior = teachers[i] if teachers else result.belief
        features = seen if seen is features else seen.detach()  # shared by all stages, or cut from the stage before
    streams.join()
    del summing  # held until here: a later stage would make it anew, on its own stream
    return torch.stack(losses), logits.detach()


def all_stages(
    stacked: StackedStages,
    features: Tensor,
    targets: Tensor,
    alphas: Sequence[float | Tensor],
    optimizers: Optimizers,
    at_once: bool,
    loss: dict,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers for equal plain stages, from one kernel along the cascade and one product for all stages; also
    the gradient of the features."""
    if any(isinstance(alpha, Tensor) for alpha in alphas):
        alphas = torch.stack([a if isinstance(a, Tensor) else features.new_full((), a) for a in alphas])
    weights = stacked.weights
    if features.is_cuda and dtype is not torch.float32:  # on a CPU the kernel in float32 is the faster one
        features, weights = features.to(dtype), CascadeWeights(*(w.to(dtype) for w in weights))
    out = stacked.gradients if optimizers and weights is stacked.weights else None
    result, dfeatures, gradients = refine_cascade_and_grad(features, weights, targets, alphas, out=out, **loss)
    if optimizers:
        if out is None:
            torch._foreach_copy_(list(stacked.gradients), list(gradients))
        stacked.show_gradients()
        if at_once:
            for parameter, gradient in zip(stacked.weights, stacked.gradients, strict=True):
                parameter.grad = gradient
        update(optimizers[1:])
    else:
        stacked.add_gradients(gradients)
    return result.stage_loss, result.logits, dfeatures.float()


def summed_losses(
    network: SIDNetwork,
    inputs: Tensor,
    targets: Tensor,
    alphas: Sequence[float | Tensor],
    optimizers: Optimizers,
    loss: dict,
    dtype: torch.dtype,
) -> StepResult:
    """The schedule `reference`: in plain PyTorch, but for what the public code does not have."""
    check_owned(optimizers, network)
    clear_gradients(optimizers)
    teachers = teacher_beliefs(network, inputs, dtype)
    with autocast(inputs, dtype):
        features = at_least_float32(network.extractor(inputs))
        priors, logits = [network.uniform(features), *teachers[:-1]], []
        for stage, prior in zip(network.stages, priors, strict=True):
            seen, z = stage(features, prior)
            features = seen if seen is features else seen.detach()
            logits.append(z)
    labels = targets if targets.is_floating_point() else F.one_hot(targets, network.num_classes)
    losses = []
    for z, q, alpha in zip(logits, priors, alphas, strict=True):
        if loss["divergence"] == "reverse" or loss["label_smoothing"]:
            losses.append(fused_local_loss(z, q, targets, alpha, **loss).loss)
            continue
        log_p = F.log_softmax(at_least_float32(z), dim=1)
        fidelity = F.kl_div(log_p, labels.to(log_p.dtype), reduction="batchmean")
        consistency = F.kl_div(log_p, q, reduction="batchmean")
        losses.append(alpha * fidelity + (1 - alpha) * consistency)
    losses = torch.stack(losses)
    losses.sum().backward()
    update(optimizers)
    return StepResult(losses.detach(), logits[-1].detach())


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


def check_optimizers(optimizers: Optimizers, network: SIDNetwork, stacked: StackedStages | None) -> bool:
    """Whether there is one for all stages; ValueError unless there is that, or one a stage, or none at all."""
    expected = 1 + len(network.stages)
    if not optimizers:
        return False
    owned = {id(p) for optimizer in optimizers[1:] for group in optimizer.param_groups for p in group["params"]}
    if stacked is not None and len(optimizers) == 2 and owned == {id(p) for p in stacked.weights}:
        return True
    own = network.stages.parameters  # looked through until the first that is owned: this runs at every step
    if len(optimizers) != expected or (all(id(p) not in owned for p in own()) and any(True for _ in own())):
        raise ValueError(
            f"optimizers must be one for the extractor and one a stage, {expected}, each over its own parameters (or,"
            " for sid_step one-pass and equal stages, one for the extractor and one over"
            f" stacked_stages(network).parameters()), not {len(optimizers)}"
        )
    return False


def check_owned(optimizers: Optimizers, network: SIDNetwork) -> None:
    """ValueError unless all that is to be updated are parameters autograd gives gradients: the network's own."""
    if optimizers:
        owned = {id(p) for optimizer in optimizers if optimizer for g in optimizer.param_groups for p in g["params"]}
        if not owned <= {id(p) for p in network.parameters()}:
            raise ValueError(
                "optimizers must be over the network's own parameters; those of stacked_stages(network) are for"
                " sid_step one-pass"
            )


def clear_gradients(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)


def update(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.step()


def autocast(inputs: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32)
