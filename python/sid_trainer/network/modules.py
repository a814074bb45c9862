"""The network SID trains: an extractor and stages that each turn the preceding belief into a better one.

Nothing here knows how the network is trained.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .heads import StackedHeads, StageCall
from .local_pass import (
    LocalOutput,
    LocalPass,
    add_terms,
    at_least_float32,
    float16_scale,
    reshard,
    take_terms,
    uniform_belief,
    warn_of_input_gradients,
)
from .loss_options import StageLossOptions


class Stage(nn.Module):
    """One local learner: a body that computes the stage's features, and a head that computes its logits from them.

    Args:
        head: Called as head(features, prior), with the belief (B, C) of the stage before; returns logits (B, C).
        body: Computes the features from those of the stage before; None is the identity, as in the shared layout.
    """

    def __init__(self, head: nn.Module, body: nn.Module | None = None):
        super().__init__()
        self.body = nn.Identity() if body is None else body
        self.head = head

    def forward(self, features: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Return this stage's features and logits (B, C), given the preceding features and belief (B, C)."""
        features = self.body(features)
        return features, self.head(features, prior)


class Prediction(NamedTuple):
    """What `SIDNetwork.predict` returns."""

    logits: Tensor  # (B, C), those of the stage at which each image left
    stage: Tensor  # (B,) int64, that stage, counted from 0


def certainty(belief: Tensor) -> Tensor:
    """Return the largest entry (...) of a belief (..., C) as a share of the sum of the two largest: 1/2 to 1.

    Unlike the largest entry, it hardly depends on how much of its belief a stage has learned to keep uniform.
    """
    largest = belief.topk(2, dim=-1).values
    return largest[..., 0] / largest.sum(-1)


def call_module(module: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call `module` on `inputs`; the default of `SIDNetwork.stage_logits`."""
    return module(*inputs)


class SIDNetwork(nn.Module):
    """An extractor and L stages; `parameters()` lists them in this order.

    Called without targets, it is plain inference and returns the *logits* of the last stage, like any PyTorch
    classifier: their argmax is the prediction and their softmax the final belief. If gradients are enabled, they flow
    through the whole chain of softmaxes, which is what backpropagation trains.

    Called with targets, it trains: every stage computes its loss and its gradients before the next one runs, so that
    one stage's activations are held, and `loss.backward()` of the returned `LocalOutput` hands every parameter its
    gradient. That fits any loop, optimizer and wrapper. `sid_step` gives the same gradients and updates as it goes.

    Args:
        extractor: Computes the features that the first stage reads; `nn.Identity()` for a stagewise network.
        stages: L modules called as `Stage` is, or `StackedHeads`.
        num_classes: Number of classes C.

    Attributes:
        loss_options: What the stages learn in a call with targets, `StageLossOptions`.
    """

    accepts_loss_kwargs = False  # tells the Trainer of transformers to divide the loss when it accumulates gradients

    def __init__(self, extractor: nn.Module, stages: Iterable[nn.Module] | StackedHeads, num_classes: int):
        super().__init__()
        self.extractor = extractor
        self.stages: nn.ModuleList | StackedHeads = (
            stages if isinstance(stages, StackedHeads) else nn.ModuleList(stages)
        )
        self.num_classes = num_classes
        self.loss_options = StageLossOptions()

    @property
    def depth(self) -> int:
        """Number of stages L."""
        return len(self.stages)

    def uniform(self, features: Tensor) -> Tensor:
        """Return p_0, the belief that the first stage reads: (B, C), every entry 1/C."""
        return uniform_belief((features.shape[0], self.num_classes), features)

    def upcast(self, features: Tensor) -> Tensor:
        """Return the extractor's features in float32 if they are half precision and the stages' parameters are not."""
        parameter = next(self.stages.parameters(), features)
        return features if parameter.dtype == features.dtype else at_least_float32(features)

    @property
    def local_modules(self) -> list[nn.Module]:
        """The modules that get one optimizer each in local training: extractor and stages (`StackedHeads`: one)."""
        return [self.extractor, *([self.stages] if isinstance(self.stages, StackedHeads) else self.stages)]

    def local_stages(self) -> Iterable[StageCall]:
        """Return the stages as functions (features, prior) -> (features, logits) for one backward per stage."""
        return self.stages.local_stages() if isinstance(self.stages, StackedHeads) else self.stages

    def stage_logits(self, inputs: Tensor, call: Callable[..., Any] = call_module) -> list[Tensor]:
        """Return the logits (B, C) of every stage, first to last; each prior is the softmax of the logits before.

        `call(module, *inputs)` runs each block of the extractor and each stage. Activation checkpointing replaces it.
        """
        features = inputs
        for block in self.extractor if isinstance(self.extractor, nn.Sequential) else [self.extractor]:
            features = call(block, features)
        features = self.upcast(features)
        prior, stage_logits = self.uniform(features), []
        for stage in self.stages:
            features, logits = call(stage, features, prior)
            prior = at_least_float32(logits).softmax(dim=1)
            stage_logits.append(logits)
        return stage_logits

    def plain(self, stage: int = -1) -> "SIDNetwork":
        """Return the trunk up to one stage and that stage's head, which reads the uniform belief.

        It shares its modules with this network and needs no other head. Raises ValueError for `StackedHeads`.
        """
        if isinstance(self.stages, StackedHeads):
            raise ValueError("plain inference needs a network of separate stages, not StackedHeads")
        *before, last = list(self.stages)[: len(self.stages) if stage == -1 else stage + 1]
        trunk = nn.Sequential(self.extractor, *(module.get_submodule("body") for module in before))
        return type(self)(trunk, [last], self.num_classes).train(self.training)

    def averaged(self, inputs: Tensor) -> Tensor:
        """Return the mean over the stages of the logarithms of their beliefs (B, C); its argmax is a prediction."""
        log_beliefs = [at_least_float32(logits).log_softmax(dim=1) for logits in self.stage_logits(inputs)]
        return torch.stack(log_beliefs).mean(0)

    @torch.no_grad()
    def predict(self, inputs: Tensor, confidence: float = 0.9) -> Prediction:
        """Return the logits of the first stage that is sure of each image; later stages do not run for that image.

        A stage is sure if the `certainty` of its belief is at least `confidence`, in [0, 1]. Images of which no stage
        is sure have the last stage's logits. Call `eval()` before. Raises ValueError for another confidence.
        """
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be in [0, 1], not {confidence}")
        features = self.upcast(self.extractor(inputs))
        prior, remaining = self.uniform(features), torch.arange(len(inputs), device=features.device)
        logits = torch.empty_like(prior)
        exits = torch.full_like(remaining, self.depth - 1)
        stages: Iterable[StageCall] = self.stages
        for i, stage in enumerate(stages):
            features, stage_logits = stage(features, prior)
            stage_logits = at_least_float32(stage_logits)
            prior = stage_logits.softmax(dim=1)
            logits[remaining] = stage_logits.to(logits.dtype)
            sure = certainty(prior) >= confidence
            if sure.any():
                exits[remaining[sure]], unsure = i, ~sure
                features, prior, remaining = features[unsure], prior[unsure], remaining[unsure]
            if not len(remaining):
                break
        return Prediction(logits, exits)

    def beliefs(self, inputs: Tensor) -> Tensor:
        """Return the belief of every stage, (L, B, C)."""
        return at_least_float32(torch.stack(self.stage_logits(inputs))).softmax(dim=2)

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, *, labels: Tensor | None = None
    ) -> Tensor | LocalOutput:
        """Return the last stage's logits (B, C), or with targets (B,) or (B, C) (or `labels`) a `LocalOutput`."""
        targets = labels if targets is None else targets
        if targets is None:
            return self.stage_logits(inputs)[-1]
        warn_of_input_gradients(inputs)
        return self.learn(inputs, targets)

    def learn(self, inputs: Tensor, targets: Tensor) -> LocalOutput:
        """Compute every stage's loss and gradients, as a call with targets does."""
        if not isinstance(inputs, Tensor):
            kind = type(inputs).__name__
            raise TypeError(f"inputs must be one tensor, not a {kind}; a network cut by names takes several")
        reshard(self)
        with LocalPass(targets, self.loss_options, len(self.stages)) as local:
            extracted = self.extractor(inputs)
            terms = take_terms(local.terms)
            features = self.upcast(extracted.detach()).requires_grad_(extracted.requires_grad)
            shared = features
            if isinstance(self.stages, StackedHeads):
                logits = local.learn_cascade(features, self.stages.weights)
            else:
                prior = self.uniform(features)
                for stage in self.stages:
                    parameters = list(stage.parameters())  # before it runs: `fully_shard` replaces them meanwhile
                    outputs, logits = stage(features, prior)
                    prior = local.learn(logits, prior, parameters, features)
                    features = outputs if outputs is features else outputs.detach()
            local.losses[0] = add_terms(local.losses[0], terms)
            scale = float16_scale(extracted.dtype, len(inputs), self.extractor.parameters())
            outputs, output_gradients = list(terms), [torch.full_like(term, scale) for term in terms]
            if shared.grad is not None:
                outputs.append(extracted)
                output_gradients.append((shared.grad * scale).to(extracted.dtype))
            local.collect(outputs, output_gradients, self.extractor.parameters(), scale=scale)
            return local.output(logits)
