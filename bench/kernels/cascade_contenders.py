"""One training step of a cascade of equal belief stages, optimizer and all, in every way we compare, and its check.

Every contender works on its own copy of one network and of the features (B, D), which are a leaf that wants its
gradient, as the output of an extractor does. Nothing is timed in this file.
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
from sid_trainer.methods.common import StepOptions, clear_gradients, update
from sid_trainer.methods.reference import reference_step as public_step
from sid_trainer.methods.step import stage_by_stage

SIZES = ((10, 128, 256, 128, 10), (10, 128, 256, 128, 100), (10, 128, 256, 128, 1000))  # (L, B, H, D, C)
RATE, EPSILON = 1e-5, 1e-8  # of Adam: so slow that thousands of steps on one batch leave the network as it was


def label(size: tuple[int, ...]) -> str:
    return "cascade step, L={} B={} H={} D={} C={}".format(*size)


class Problem(NamedTuple):
    network: SIDNetwork  # L stages; the extractor is the identity
    features: Tensor  # (B, D)
    target: Tensor  # (B,) int64


def make_problem(size: tuple[int, int, int, int, int], device: str, seed: int = 0) -> Problem:
    stages, rows, width, dim, classes = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [StageHead(dim, classes, width) for _ in range(stages)]
        features, target = torch.randn(rows, dim), torch.randint(0, classes, (rows,))
    # Beliefs are about 1 / C. Weighted like features, they make backpropagated gradients vanish into denormal numbers,
    # which slow a CPU down fourfold at C = 1000 (measured) and are no matter of how a step is computed.
    with torch.no_grad():
        for head in heads:
            head.hidden.weight[:, :classes] *= classes
    network = SIDNetwork(nn.Identity(), [Stage(head) for head in heads], classes)
    return Problem(network.to(device), features.to(device), target.to(device))


class Run(NamedTuple):
    """A contender at work on its own network."""

    step: Callable[[], Tensor]  # one step; returns the gradient of the features
    network: SIDNetwork
    features: Tensor
    kept: int = 0  # bytes it keeps between steps beyond parameters and optimizers' states

    @property
    def returned(self) -> int:
        """Bytes of what a step leaves: the gradients of the features and of all parameters."""
        return nbytes([self.features, *self.network.parameters()])

    def clear(self) -> None:
        for x in (self.features, *self.network.parameters()):
            x.grad = None

    def gradients(self, dfeatures: Tensor) -> dict[str, Tensor]:
        """Of the features (B, D) and of the parameters, (L, ...) by kind."""
        return {"features": dfeatures} | _stacked(self.network, lambda parameter: parameter.grad)


class Contender(NamedTuple):
    name: str
    what: str
    start: Callable[[SIDNetwork, Tensor, Tensor], Run]  # of its own network and features, and the target
    backpropagates: bool = False  # then its gradient is that of the last stage's loss, through all stages
    ours: bool = False
    compiled: bool = False
    replayed: bool = False  # a captured graph: what it allocates, it keeps

    def run(self, problem: Problem) -> Run:
        features = problem.features.clone().requires_grad_()
        return self.start(copy.deepcopy(problem.network), features, problem.target)


# ---------------------------------------------------------------- the steps


OPTIONS = StepOptions(ALPHA)


def reference_step(network: SIDNetwork, features: Tensor, target: Tensor, optimizers=(), inner=public_step) -> None:
    """Call what sid_step's schedule `reference` calls."""
    inner(network, features, target, OPTIONS, optimizers)


def last_loss(network: SIDNetwork, features: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(network(features), target)


def bp_step(network: SIDNetwork, features: Tensor, target: Tensor, optimizers=(), inner=last_loss) -> None:
    """Plainer than the trainer's, which can also take a batch in parts."""
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
        buffer = torch.empty_like(features)  # where the features' gradient lies does not change from replay to replay

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
    """With an ordinary Adam a stage."""
    optimizers = _one_a_stage(network)

    def step() -> Tensor:
        features.grad = None
        whole(network, features, target, optimizers)
        return features.grad

    return Run(step, network, features)


def with_one_adam(whole: Callable, network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    """The same with one fused Adam over all parameters, which gives the same numbers."""
    optimizer = _adam(network.parameters(), fused=True)

    def step() -> Tensor:
        features.grad = None
        optimizer.zero_grad(set_to_none=True)
        whole(network, features, target)
        optimizer.step()
        return features.grad

    return Run(step, network, features)


def compiled(whole: Callable, inner: Callable, network: SIDNetwork, features: Tensor, target: Tensor) -> Run:
    """Forward and loss as one compiled graph; `backward`, at which the compiler stops, runs the compiled one."""
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
    one, each = "one fused Adam over all stages", "an ordinary Adam a stage"
    return [
        Contender(DIRECT, f"ours, called directly on stacked weights; {one}", direct, ours=True),
        Contender(TRAINER, f"ours as the trainer calls it; {one}", in_trainer, ours=True),
        Contender(CAPTURED, "the same in a CUDA graph, its batch copied in", part(in_trainer, captured=True),
                  ours=True, replayed=True),
        Contender(STAGES, "ours, the local loss stage by stage; a fused Adam a stage", by_stage, ours=True),
        Contender(REFERENCE, f"{reference}; {each}", part(with_adams, reference_step)),
        Contender(REFERENCE_FUSED, f"{reference}; {one}", part(with_one_adam, reference_step)),
        Contender(REFERENCE_COMPILED, f"the same, forward and loss under torch.compile; {one}",
                  part(compiled, reference_step, public_step), compiled=True),
        Contender(BP, f"{bp}; {each}", part(with_adams, bp_step), True),
        Contender(BP_FUSED, f"{bp}; {one}", part(with_one_adam, bp_step), True),
        Contender(BP_COMPILED, f"{bp} under torch.compile; {one}", part(compiled, bp_step, last_loss), True,
                  compiled=True),
    ]  # fmt: skip


def names() -> list[str]:
    return [contender.name for contender in _listed()]


def contenders(device: str, problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run, by name, and the reason for each one left out. Drops code compiled for sizes before."""
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

UPDATE_TOLERANCE = 1e-2  # of the largest change Adam makes in its first step, which is its learning rate


def truth(problem: Problem) -> dict[bool, dict[str, Tensor]]:
    """Gradients in float64, by whether they are backpropagation's."""
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
    """What `of` gives for the parameters, (L, ...) by kind."""
    if isinstance(network.stages, StackedHeads):
        return {name: of(x) for name, x in network.stages.weights._asdict().items()}
    heads = [stage.head for stage in network.stages]
    parts = [[of(x) for x in (h.hidden.weight, h.hidden.bias, h.logits.weight, h.logits.bias)] for h in heads]
    return {name: torch.stack(x) for name, x in zip(CascadeWeights._fields, zip(*parts, strict=True), strict=True)}


def check(contender: Contender, run: Run, problem: Problem, expected: dict) -> dict[str, float]:
    """The errors of a first step's gradients, and of what Adam makes of them, relative to the largest change."""
    before = _stacked(run.network, lambda parameter: parameter.detach().double())
    found = run.gradients(run.step())
    after = _stacked(run.network, lambda parameter: parameter.detach().double())
    errors = {}
    for name, want in expected[contender.backpropagates].items():
        errors[name] = _relative(found[name], want)
        allowed = TOLERANCE[torch.float32]
        assert errors[name] <= allowed, f"{contender.name}: gradient of {name} is off by {errors[name]:.1e}"
    errors["update"] = 0.0
    for name, start in before.items():
        gradient = found[name].double()
        want = start - RATE * gradient / (gradient.abs() + EPSILON)
        off = (after[name] - want).abs() - 2.0**-23 * start.abs()  # beyond the rounding of the parameter itself
        errors["update"] = max(errors["update"], float(off.max()) / RATE)
    assert errors["update"] <= UPDATE_TOLERANCE, f"{contender.name}: update is off by {errors['update']:.1e}"
    return errors


def _relative(found: Tensor, want: Tensor) -> float:
    assert found.shape == want.shape, f"shape {tuple(found.shape)}, expected {tuple(want.shape)}"
    return float((found.detach().double() - want).norm() / want.norm())
