"""Make a training step of a cascade of equal stages in every way we compare, and check its results.

A step includes that of the optimizer. Every contender has its own copy of the network and of the features (B, D). The
features are a leaf that requires a gradient, like the output of an extractor. This file times nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from bench.kernels.contenders import ALPHA, TOLERANCE, no_compiler
from bench.lib.footprint import nbytes
from sid_kernels import CascadeWeights, refine_cascade_and_grad
from sid_trainer import SIDNetwork, StackedHeads, Stage, StageHead, capture, sid_step
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.reference import reference_step as public_step
from sid_trainer.methods.step import stage_by_stage
from sid_trainer.methods.updates import clear_gradients, update

SIZES = ((10, 128, 256, 128, 10), (10, 128, 256, 128, 100), (10, 128, 256, 128, 1000))  # (L, B, H, D, C)
RATE, EPSILON = 1e-5, 1e-8  # of Adam; so small a rate that thousands of steps on one batch hardly change the network


def label(size: tuple[int, ...]) -> str:
    """Return the text that names a size in tables."""
    return "cascade step, L={} B={} H={} D={} C={}".format(*size)


class Problem(NamedTuple):
    network: SIDNetwork  # L stages; the extractor is the identity
    features: Tensor  # (B, D)
    target: Tensor  # (B,) int64


def make_problem(size: tuple[int, int, int, int, int], device: str, seed: int = 0) -> Problem:
    """Return a random network of `stages` stages, features and labels of a size L, B, H, D, C."""
    stages, rows, width, dim, classes = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [StageHead(dim, classes, width) for _ in range(stages)]
        features, target = torch.randn(rows, dim), torch.randint(0, classes, (rows,))
    # Beliefs are about 1 / C. With weights as large as those of features, backpropagated gradients become denormal
    # numbers. These slow a CPU down fourfold at C = 1000 (measured), which is not what the contenders differ in.
    with torch.no_grad():
        for head in heads:
            head.hidden.weight[:, :classes] *= classes
    network = SIDNetwork(nn.Identity(), [Stage(head) for head in heads], classes)
    return Problem(network.to(device), features.to(device), target.to(device))


class Run(NamedTuple):
    """A contender with its own network and features."""

    step: Callable[[], Tensor]  # one step; returns the gradient of the features
    network: SIDNetwork
    features: Tensor
    kept: int = 0  # bytes kept between steps, besides parameters and the states of optimizers

    @property
    def returned(self) -> int:
        """Return the bytes of the gradients of the features and of all parameters, which a step leaves."""
        return nbytes([self.features, *self.network.parameters()])

    def clear(self) -> None:
        """Free the gradients of the features and of all parameters."""
        for x in (self.features, *self.network.parameters()):
            x.grad = None

    def gradients(self, dfeatures: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the features (B, D) and, stacked over stages (L, ...), of the parameters, by name."""
        return {"features": dfeatures} | _stacked(self.network, lambda parameter: parameter.grad)


class Contender(NamedTuple):
    name: str
    description: str
    start: Callable[[SIDNetwork, Tensor, Tensor], Run]  # takes a network and features of its own, and the target
    backpropagates: bool = False  # its gradient is that of the last stage's loss, through all stages
    ours: bool = False
    compiled: bool = False
    replayed: bool = False  # runs as a captured graph, which keeps the memory that it allocates

    def run(self, problem: Problem) -> Run:
        """Start the contender on copies of the problem's network and features."""
        features = problem.features.clone().requires_grad_()
        return self.start(copy.deepcopy(problem.network), features, problem.target)


# ---------------------------------------------------------------- the steps


OPTIONS = StepOptions(ALPHA)


def reference_step(network: SIDNetwork, features: Tensor, target: Tensor, optimizers=(), inner=public_step) -> None:
    """Make the step that `sid_step(schedule="reference")` makes."""
    inner(network, features, target, OPTIONS, optimizers)


def last_loss(network: SIDNetwork, features: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(network(features), target)


def bp_step(network: SIDNetwork, features: Tensor, target: Tensor, optimizers=(), inner=last_loss) -> None:
    """Make a step of backpropagation. The trainer's step can also take a batch in parts; this one cannot."""
    clear_gradients(optimizers)
    inner(network, features, target).backward()
    update(optimizers)


def _adam(parameters, fused: bool) -> Adam:
    return Adam(parameters, lr=RATE, eps=EPSILON, fused=True) if fused else Adam(parameters, lr=RATE, eps=EPSILON)


def _one_a_stage(network: SIDNetwork, fused: bool = False) -> list:
    return [None, *(_adam(stage.parameters(), fused) for stage in network.stages)]  # the extractor has no parameters


def stack(network: SIDNetwork) -> SIDNetwork:
    """Return the network with its stages as `StackedHeads`."""
    depth, classes, hidden = len(network.stages), network.num_classes, network.stages[0].head.hidden
    heads = StackedHeads(depth, hidden.in_features - classes, classes, hidden.out_features)
    stacked = SIDNetwork(nn.Identity(), heads, classes)
    stacked.load_state_dict(network.state_dict())
    return stacked.to(hidden.weight.device)


def direct(network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    network = stack(network)
    weights = network.stages.weights
    gradients = CascadeWeights(*(torch.empty_like(weight) for weight in weights))
    optimizer = _adam(weights, fused=True)
    for parameter, gradient in zip(weights, gradients, strict=True):
        parameter.grad = gradient

    def step() -> Tensor:
        _, dfeatures, _ = refine_cascade_and_grad(features, weights, target, ALPHA, out=gradients)
        optimizer.step()
        return dfeatures

    return Run(step, network, features, nbytes(gradients))


def in_trainer(network: SIDNetwork, features: Tensor, target: Tensor, captured: bool = False) -> Run:
    network = stack(network)
    optimizer = _adam(network.stages.parameters(), fused=True)

    def whole(features, target):
        return sid_step(network, features, target, ALPHA, [None, optimizer])

    if captured:
        buffer = torch.empty_like(features)  # every replay writes the features' gradient to the same memory

        def copied(features, target):
            leaf = features.detach().requires_grad_()
            whole(leaf, target)
            buffer.copy_(leaf.grad)

        replay = capture(copied, (features.detach(), target), network=network, optimizers=[optimizer])

        def step() -> Tensor:
            replay(features.detach(), target)
            return buffer

        return Run(step, network, features)

    def step() -> Tensor:
        features.grad = None
        whole(features, target)
        return features.grad

    return Run(step, network, features, nbytes(network.stages.weights))


def by_stage(network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    optimizers = _one_a_stage(network, fused=True)

    def step() -> Tensor:
        features.grad = None
        network.zero_grad(set_to_none=True)
        stage_by_stage(network, features, target, OPTIONS, optimizers)
        return features.grad

    return Run(step, network, features)


def with_adams(whole: Callable, network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    """Start a run that updates each stage with an ordinary Adam of its own."""
    optimizers = _one_a_stage(network)

    def step() -> Tensor:
        features.grad = None
        whole(network, features, target, optimizers)
        return features.grad

    return Run(step, network, features)


def with_one_adam(whole: Callable, network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    """Start a run that updates all stages with one fused Adam, to the same values as with an Adam per stage."""
    optimizer = _adam(network.parameters(), fused=True)

    def step() -> Tensor:
        features.grad = None
        optimizer.zero_grad(set_to_none=True)
        whole(network, features, target)
        optimizer.step()
        return features.grad

    return Run(step, network, features)


def compiled(whole: Callable, inner: Callable, network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    """Start a run with one fused Adam whose forward pass and loss are one graph under torch.compile.

    The compiler stops at `backward`, which then runs the backward graph that it compiled with the forward graph.
    """
    whole = functools.partial(whole, inner=torch.compile(inner, dynamic=False))
    return with_one_adam(whole, network, features, target)


# ---------------------------------------------------------------- the list

DIRECT, TRAINER = "refine_cascade_and_grad", "sid_step"
REFERENCE, BP = "reference step", "BP step"
REFERENCE_FUSED, BP_FUSED = "reference step, one Adam", "BP step, one Adam"
REFERENCE_COMPILED, BP_COMPILED = "compiled reference step, one Adam", "compiled BP step, one Adam"
STAGES, CAPTURED = "stage by stage", "sid_step, captured"


def _listed() -> list[Contender]:
    part = functools.partial
    reference, bp = "as the public code does it: two forward passes, a summed loss", "backpropagation"
    one_adam, adams = "one fused Adam over all stages", "an ordinary Adam a stage"
    return [
        Contender(DIRECT, f"ours, called directly on stacked weights; {one_adam}", direct, ours=True),
        Contender(TRAINER, f"ours as the trainer calls it; {one_adam}", in_trainer, ours=True),
        Contender(CAPTURED, "the same in a CUDA graph, its batch copied in", part(in_trainer, captured=True),
                  ours=True, replayed=True),
        Contender(STAGES, "ours, the local loss stage by stage; a fused Adam a stage", by_stage, ours=True),
        Contender(REFERENCE, f"{reference}; {adams}", part(with_adams, reference_step)),
        Contender(REFERENCE_FUSED, f"{reference}; {one_adam}", part(with_one_adam, reference_step)),
        Contender(REFERENCE_COMPILED, f"the same, forward and loss under torch.compile; {one_adam}",
                  part(compiled, reference_step, public_step), compiled=True),
        Contender(BP, f"{bp}; {adams}", part(with_adams, bp_step), True),
        Contender(BP_FUSED, f"{bp}; {one_adam}", part(with_one_adam, bp_step), True),
        Contender(BP_COMPILED, f"{bp} under torch.compile; {one_adam}", part(compiled, bp_step, last_loss), True,
                  compiled=True),
    ]  # fmt: skip


def names() -> list[str]:
    return [contender.name for contender in _listed()]


def contenders(device: str, problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that can run, by name, and the reason for each one left out.

    Code that torch.compile made for earlier sizes is dropped.
    """
    torch._dynamo.reset()
    listed, left_out = {}, {}
    for contender in _listed():
        reason = no_compiler(device) if contender.compiled else None
        if contender.replayed and device == "cpu":
            reason = "CUDA graphs exist on GPUs only"
        if reason:
            left_out[contender.name] = reason
        else:
            listed[contender.name] = contender
    return listed, left_out


# ---------------------------------------------------------------- the check

UPDATE_TOLERANCE = 1e-2  # relative to the learning rate, which is the largest change in Adam's first step


def truth(problem: Problem) -> dict[bool, dict[str, Tensor]]:
    """Return the expected gradients in float64: under True those of backpropagation, under False those of SID."""
    return {backpropagates: _gradients(problem, backpropagates) for backpropagates in (False, True)}


def _gradients(problem: Problem, backpropagates: bool) -> dict[str, Tensor]:
    network = copy.deepcopy(problem.network).double()
    features = problem.features.double().requires_grad_()
    belief, losses = network.uniform(features), []
    for stage in network.stages:
        q = belief if backpropagates else belief.detach()
        log_p = stage.head(features, q).log_softmax(1)
        fidelity = F.nll_loss(log_p, problem.target)
        consistency = (torch.special.xlogy(q, q) - q * log_p).sum(1).mean()
        losses.append(ALPHA * fidelity + (1 - ALPHA) * consistency)
        belief = log_p.exp()
    (fidelity if backpropagates else torch.stack(losses).sum()).backward()
    return {"features": features.grad} | _stacked(network, lambda parameter: parameter.grad)


def _stacked(network: SIDNetwork, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply `of` to every parameter and stack the results over stages (L, ...), by name."""
    if isinstance(network.stages, StackedHeads):
        return {name: of(x) for name, x in network.stages.weights._asdict().items()}
    heads = [stage.head for stage in network.stages]
    parts = [[of(x) for x in (h.hidden.weight, h.hidden.bias, h.logits.weight, h.logits.bias)] for h in heads]
    return {name: torch.stack(x) for name, x in zip(CascadeWeights._fields, zip(*parts, strict=True), strict=True)}


def check(contender: Contender, run: Run, problem: Problem, expected: dict) -> dict[str, float]:
    """Make one step and return the relative errors of its gradients and of its update.

    The error of the update is relative to the learning rate. Raises AssertionError if an error is above its tolerance.
    """
    before = _stacked(run.network, lambda parameter: parameter.detach().double())
    gradients = run.gradients(run.step())
    after = _stacked(run.network, lambda parameter: parameter.detach().double())
    errors = {}
    for name, reference in expected[contender.backpropagates].items():
        errors[name] = _relative(gradients[name], reference)
        allowed = TOLERANCE[torch.float32]
        assert errors[name] <= allowed, f"{contender.name}: gradient of {name} is off by {errors[name]:.1e}"
    errors["update"] = 0.0
    for name, start in before.items():
        gradient = gradients[name].double()
        reference = start - RATE * gradient / (gradient.abs() + EPSILON)
        error = (after[name] - reference).abs() - 2.0**-23 * start.abs()  # without the rounding of the parameter itself
        errors["update"] = max(errors["update"], float(error.max()) / RATE)
    assert errors["update"] <= UPDATE_TOLERANCE, f"{contender.name}: update is off by {errors['update']:.1e}"
    return errors


def _relative(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the error relative to the norm of the reference."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    return float((value.detach().double() - reference).norm() / reference.norm())
