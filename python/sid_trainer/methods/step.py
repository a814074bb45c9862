"""The SID step: every stage of a network learns from its own loss, and no gradient crosses stages.

Source: arXiv 2510.03273. A stage learns from the loss of its own belief p_i against the target y and its prior p_{i-1}:

    L_i = alpha * CE(y, p_i) + (1 - alpha) * KL(p_{i-1} || p_i)        p_{i-1} constant, p_0 uniform
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..network.heads import StackedHeads
from ..network.language import LanguageModel
from ..network.local_pass import add_terms, collect_terms, stage_loss
from ..network.loss_options import Alpha
from ..network.modules import SIDNetwork, at_least_float32
from .common import (
    StepOptions,
    StepResult,
    autocast,
    check_network,
    check_optimizers,
    check_parameter_dtype,
    forward_dtype,
    teacher_beliefs,
)
from .readouts import train_readouts, trains_in_chunks
from .reference import reference_step
from .stacked import train_stacked
from .streams import StageHooks
from .updates import Optimizers, clear_gradients, run_together, update


def sid_step(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, alpha: Alpha = 0.5, optimizers: Optimizers | None = None, *,
    schedule: str = "one-pass", fused: bool = True, divergence: str = "forward",
    label_smoothing: float | Sequence[float] = 0.0, dtype: torch.dtype = torch.float32,
    streams: StageHooks | None = None,
) -> StepResult:  # fmt: skip
    """Train every stage by its own loss, and the extractor by the sum of the stages' gradients.

    Args:
        inputs, targets: (B, ...) for the extractor; classes (B,), int64, or probabilities (B, C).
        alpha: Weight of fidelity against consistency in [0, 1]; one number or one per stage.
        optimizers: One for the extractor (None if it has no parameters) and one per stage, or one for all stages if
            `network.stages` is `StackedHeads`. Gradients they own are cleared first. Without optimizers the step only
            adds to the gradients in `.grad`, as `backward` does.
        schedule: "one-pass": each stage runs and gets its gradients before the next one runs, so only one stage's
            activations are held. "two-phase", as in the paper: a pass without gradients computes all priors, then every
            stage learns. "reference", as in the public implementation: the two phases, but one backward over the sum of
            all losses, which holds all activations. All three give the same gradients, unless a layer draws random
            numbers or keeps statistics.
        fused: Train `StackedHeads` at once with `sid_kernels.refine_cascade` in the schedule "one-pass": the same
            numbers in less time, with at most 16 MiB (or one stage, if that is more) held.
        divergence, label_smoothing: As in `sid_kernels.local_loss_and_grad`; smoothing also as one number per stage.
        dtype: Forward passes run under autocast to this dtype; for float32, under the caller's autocast, if any.
        streams: Hooks around stages that run one by one, for example `StageStreams`.

    Returns the losses (L,) and the last logits (B, C) from before the update; never waits for a device. Raises
    ValueError for options that are not allowed and for optimizers that do not fit, TypeError for a wrapped network.
    Warns if there are several processes: gradients are not reduced over them.
    """
    check_network(network)
    with forward_dtype(inputs, dtype) as dtype:
        options = StepOptions(alpha, divergence, label_smoothing, dtype, schedule, fused)
        return local_step(network, inputs, targets, options, optimizers or (), streams)


def local_step(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = (),
    hooks: StageHooks | None = None,
) -> StepResult:  # fmt: skip
    """Do what `sid_step` describes, with its options in one object."""
    options.stage_alphas(len(network.stages))
    check_parameter_dtype(network)
    if options.step_schedule == "reference":
        return reference_step(network, inputs, targets, options, optimizers)
    check_optimizers(optimizers, network)
    if isinstance(network, LanguageModel) and trains_in_chunks(network, len(targets), options):
        return train_readouts(network, inputs, targets, options, optimizers)
    clear_gradients(optimizers[:1])
    with collect_terms() as terms, autocast(inputs, options.dtype):
        extracted = network.extractor(inputs)
    # The extractor's graph ends here. The gradients that stages send back are summed in float32.
    features = at_least_float32(extracted.detach())
    if options.trains_at_once and isinstance(network.stages, StackedHeads):
        losses, logits, dfeatures = train_stacked(network.stages, features, targets, options, optimizers[1:])
    else:
        clear_gradients(optimizers[1:])
        features.requires_grad_(extracted.requires_grad)  # a leaf whose gradient sums over the stages that read it
        two_phase = options.step_schedule == "two-phase"
        teachers = teacher_beliefs(network, inputs, options.dtype) if two_phase else None
        losses, logits = stage_by_stage(network, features, targets, options, optimizers, teachers, hooks)
        dfeatures = features.grad
    if terms:
        losses[0] = add_terms(losses[0], terms)
    backward(extracted, None if dfeatures is None else dfeatures.to(extracted.dtype), terms)
    update(optimizers[:1])
    return StepResult(losses, logits)


def stage_by_stage(
    network: SIDNetwork, features: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = (),
    teachers: Sequence[Tensor] | None = None, hooks: StageHooks | None = None, prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train the stages one by one and return their losses (L,) and the last logits (B, C).

    `teachers` are the beliefs (B, C) that later stages read, if they were computed before. `prior` (B, C) is the belief
    that the first of these stages reads: uniform, unless other processes run stages before it.
    """
    hooks, alphas = hooks or StageHooks(), options.stage_alphas(len(network.stages))
    prior, losses = network.uniform(features) if prior is None else prior, []
    # Autograd adds the gradients of shared features on the stream where this node is created; it is kept to the end.
    accumulation = get_gradient_edge(features) if features.requires_grad else None
    # One optimizer of all stages, or ordinary ones in one call, update after the last stage has run.
    at_end = isinstance(network.stages, StackedHeads) or (type(hooks) is StageHooks and run_together(optimizers[1:]))
    stages = list(network.local_stages())  # before the hooks: StackedHeads may create gradients on this stream
    hooks.step_started()
    for i, stage in enumerate(stages):
        with hooks.run_stage(i):  # waits for the outputs of the stage before, not for its backward and update
            with collect_terms() as terms, autocast(features, options.dtype):
                outputs, logits = stage(features, prior)  # the stage's features, and logits (B, C)
            # p_0 is passed as the tensor that the head reads, not as None, so that the belief is float32 like it.
            loss, belief, dlogits = stage_loss(
                logits, prior, targets, alphas[i], options.loss_of_stage(i), options.class_weight
            )
            hooks.outputs_ready(outputs, belief)
            backward(logits, dlogits, terms)  # frees this stage's graph; its weights may change from here on
            if not at_end:
                hooks.update(partial(update, optimizers[1 + i : 2 + i]))
        losses.append(add_terms(loss, terms))
        prior = belief if teachers is None else teachers[i]
        features = outputs if outputs is features else outputs.detach()  # shared by all stages, or this stage's own
    hooks.step_finished()
    if at_end:
        update(optimizers[1:])
    del accumulation
    return torch.stack(losses), logits.detach()


def backward(output: Tensor, gradient: Tensor | None, terms: Sequence[Tensor]) -> None:
    """Backpropagate `gradient` (None: nothing) from `output`, and 1 from every term; skip what needs no gradient."""
    pairs = [] if gradient is None else [(output, gradient)]
    pairs += [(term, torch.ones_like(term)) for term in terms]
    if pairs := [pair for pair in pairs if pair[0].requires_grad]:
        outputs, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, gradients)
