"""Any `nn.Module`, cut into stages by the names of its submodules.

The model stays one module and runs its own `forward`. Hooks at the cuts, present during a call only, give the features
to a head and pass them on detached. A stage's gradients are computed for its own parameters only, so a connection that
skips a cut passes its value but no gradient. Tracing (`torch.fx`, `torch.export`) would need models without
data-dependent control flow, and a new module for each stage with another state dict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .local_pass import (
    LocalOutput,
    LocalPass,
    at_least_float32,
    reshard,
    shift_labels,
    uniform_belief,
    warn_of_input_gradients,
)
from .loss_options import StageLossOptions

Visit = Callable[[int, Tensor], Any]  # stage, its features


class EndOfLastStage(Exception):
    """Raised to end the model's forward after the last cut."""


class CutNetwork(nn.Module):
    """A model whose parts learn from their own losses; `cut` makes it.

    Calls take the model's inputs: one tensor, a tuple of positional inputs, or keyword inputs. Without targets they
    return the last stage's logits. With targets they return a `LocalOutput` and train as `SIDNetwork` does.

    Attributes:
        model: The model itself. The names in its state dict do not change.
        heads: One head per cut, called as head(features, prior), with a third argument if `mask` is set.
        at: The names of the submodules that end the stages.
        stage_parameters: The names of the model's parameters that each stage trains.
        untrained: The names of the model's parameters that no stage trains, such as a classifier after the last cut.
        loss_options: What the stages learn.
        own_classifier: Whether the rest of the model is the last stage and its output the logits.
        per_position: Whether there is a prediction for each token or pixel.
        series: Whether the positions are the steps of series (B, D, T), not tokens (B, T, D).
        channels: "first" or "last", where the features of the first stage have their channels.
        shift: Whether the target at a position is the label of the next one, as for causal language models.
        mask: The name of the keyword input (B, T) that is 0 at padding; None if there is none.
    """

    accepts_loss_kwargs = False  # tells the Trainer of transformers to divide the loss when it accumulates gradients

    def __init__(
        self, model: nn.Module, at: Sequence[str], heads: Iterable[nn.Module], num_classes: int, *,
        own_classifier: bool = False, per_position: bool = False, shift: bool = False, mask: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.at, self.heads = model, list(at), nn.ModuleList(heads)
        self.num_classes, self.own_classifier, self.per_position = num_classes, own_classifier, per_position
        self.shift, self.mask, self.series, self.channels = shift, mask, per_position, "last"
        self.loss_options = StageLossOptions()
        self.stage_parameters: list[list[str]] = [[] for _ in range(self.depth)]
        self.shared: list[str] = []  # frozen parameters that several stages use
        self.parameter_names = [name for name, _ in model.named_parameters()]

    @property
    def depth(self) -> int:
        """Number of stages L."""
        return len(self.at) + self.own_classifier

    def uniform(self, features: Tensor) -> Tensor:
        """Return p_0, the belief that the first stage reads: (B, C), every entry 1/C."""
        return uniform_belief((features.shape[0], self.num_classes), features)

    @property
    def untrained(self) -> list[str]:
        trained = {id(parameter) for i in range(self.depth) for parameter in self.parameters_of_stage(i)}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) not in trained]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The parameters for which DistributedDataParallel must not wait for a gradient."""
        return [f"model.{name}" for name in self.untrained]

    def parameters_of_stage(self, i: int) -> list[nn.Parameter]:
        """Return the parameters that stage i trains: of the model, then of its head."""
        parameters = [self.model.get_parameter(name) for name in self.stage_parameters[i]]
        return parameters + (list(self.heads[i].parameters()) if i < len(self.heads) else [])

    def check_parameters(self) -> None:
        """Raise ValueError if the model has other parameters than when it was cut, or trains one that stages share."""
        names = [name for name, _ in self.model.named_parameters()]
        if names != self.parameter_names and (changed := sorted(set(names) ^ set(self.parameter_names))):
            raise ValueError(f"model has other parameters than when it was cut, such as {changed[0]}: cut it again")
        for name in self.shared:
            if self.model.get_parameter(name).requires_grad:
                raise ValueError(f"parameter {name} must stay frozen, or be untied: several stages use it")

    def run(self, inputs: Any, keywords: Mapping[str, Any], visit: Visit) -> Any:
        """Run the model, and call visit(i, features) at the end of stage i.

        `visit` returns True if the model continues with detached features. Returns the model's output, or None if the
        model ends with the last cut. Raises ValueError if the cuts are not reached once each, in order.
        """
        reached, visiting, learning = 0, False, torch.is_grad_enabled()

        def end_stage(i: int, module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal reached, visiting
            if visiting or (learning and not torch.is_grad_enabled()):  # a recomputation, or a forward without a graph
                raise ValueError(
                    f"at must name modules outside of gradient checkpointing and no_grad, unlike {self.at[i]!r}: a"
                    " stage learns where it ends; checkpoint within the modules instead"
                )
            if i != reached:
                raise ValueError(f"at must name modules that run once each, in this order; {self.at[i]!r} did not")
            reached += 1
            visiting = True
            detach = visit(i, first_tensor(output))
            visiting = False
            if reached == self.depth and not torch.compiler.is_exporting():  # the exporter follows calls to their end
                raise EndOfLastStage
            return tree_map_only(Tensor, Tensor.detach, output) if detach else output

        modules = [self.model.get_submodule(name) for name in self.at]
        handles = [module.register_forward_hook(partial(end_stage, i)) for i, module in enumerate(modules)]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it passes nested tensors, which heads cannot read
        try:
            args = () if inputs is None else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            output = self.model(*args, **keywords)
        except EndOfLastStage:
            return None
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for handle in handles:
                handle.remove()
        if reached < len(self.at):
            raise ValueError(f"at must name modules that run in every call: {self.at[reached]!r} did not")
        return output

    def head_logits(self, i: int, features: Tensor, prior: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits (B, ..., C) of the head at cut i."""
        return self.heads[i](features, prior) if mask is None else self.heads[i](features, prior, mask)

    def own_logits(self, output: Any) -> Tensor:
        """Return the logits (B, ..., C) in the model's own output."""
        logits = output.logits if hasattr(output, "logits") else first_tensor(output)
        if self.per_position and logits.dim() > 3 - self.series:  # (B, C, H, W), as F.cross_entropy takes them
            logits = logits.movedim(1, -1)
        if logits.shape[-1] != self.num_classes:
            if (classes := logits.shape[-1]) == 1:
                raise ValueError("own_classifier must be False for a model with one output: it needs one per class")
            raise ValueError(f"num_classes must be {classes}, as in the model's own classifier, not {self.num_classes}")
        return logits

    def first_prior(self, features: Tensor, inputs: Any, targets: Tensor | None) -> Tensor:
        """Return the uniform belief (B, C), or (B, T, C) or (B, H, W, C) with a prediction per position.

        Raises ValueError for targets that are not one for each position.
        """
        shape = features.shape[:1]
        if self.per_position and features.dim() == 3 and not self.series:
            shape = features.shape[:2]
        elif self.per_position and targets is not None:
            shape = targets.shape[:-1] if targets.is_floating_point() else targets.shape
            if len(shape) != features.dim() - 1:
                raise ValueError(
                    f"targets must be one for each position of features {tuple(features.shape)}, not"
                    f" {tuple(targets.shape)}"
                )
        elif self.per_position:
            shape += self.input_sizes(features, inputs)
        return uniform_belief((*shape, self.num_classes), features)

    def input_sizes(self, features: Tensor, inputs: Any) -> torch.Size:
        """Return the sizes (T,), (H, W) or (D, H, W) of the first input that has them, or else of the features."""
        feature_sizes = features.shape[2:] if self.channels == "first" else features.shape[1:-1]
        tensor = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() == features.dim()), None)
        if tensor is None:
            return feature_sizes
        layouts = tensor.shape[2:], tensor.shape[1:-1]  # channels first, or last: sizes shrink alike
        factors = [[size / own for size, own in zip(sizes, feature_sizes, strict=True)] for sizes in layouts]
        return layouts[max(factors[0]) / min(factors[0]) > max(factors[1]) / min(factors[1])]

    def stage_logits(self, inputs: Any = None, **keywords: Any) -> list[Tensor]:
        """Return the logits (B, ..., C) of every stage, first to last. Gradients flow through the whole chain."""
        inputs, keywords = as_arguments(inputs, keywords)
        logits: list[Tensor] = []

        def visit(i: int, features: Tensor) -> bool:
            prior = (
                at_least_float32(logits[-1]).softmax(-1) if i else self.first_prior(features, (inputs, keywords), None)
            )
            logits.append(self.head_logits(i, features, prior, keywords.get(self.mask or "")))
            return False

        output = self.run(inputs, keywords, visit)
        return [*logits, self.own_logits(output)] if self.own_classifier else logits

    def forward(
        self, inputs: Any = None, targets: Tensor | None = None, *, labels: Tensor | None = None, **keywords: Any
    ) -> Tensor | LocalOutput:
        """Return the last stage's logits, or with targets (or `labels`, as in Hugging Face) a `LocalOutput`."""
        targets = labels if targets is None else targets
        if targets is None:
            return self.classes_first(self.stage_logits(inputs, **keywords)[-1])
        inputs, keywords = as_arguments(inputs, keywords)
        if self.shift:
            targets = shift_labels(targets, self.loss_options.ignore_index)
        prior: Tensor | None = None
        logits: Tensor | None = None

        def learn(i: int, stage_logits: Tensor) -> None:
            nonlocal prior, logits
            logits = stage_logits
            assert prior is not None
            prior = local.learn(logits, prior, parameters[i])

        def visit(i: int, features: Tensor) -> bool:
            nonlocal prior
            if prior is None:
                prior = self.first_prior(features, (inputs, keywords), targets)
            learn(i, self.head_logits(i, features, prior, keywords.get(self.mask or "")))
            return True

        self.check_parameters()
        warn_of_input_gradients((inputs, keywords))
        reshard(self)
        parameters = [self.parameters_of_stage(i) for i in range(self.depth)]
        with LocalPass(targets, self.loss_options, self.depth) as local:
            output = self.run(inputs, keywords, visit)
            if self.own_classifier:
                learn(self.depth - 1, self.own_logits(output))
            assert logits is not None
            return local.output(self.classes_first(logits))

    def classes_first(self, logits: Tensor) -> Tensor:
        """Return logits (B, H, W, C) as (B, C, H, W), those of series (B, T, C) as (B, C, T), others as they are."""
        return logits.movedim(-1, 1) if logits.dim() > 3 - self.series else logits

    def extra_repr(self) -> str:
        parts = zip([*self.at, "rest"], self.stage_parameters, strict=False)
        stages = [f"{name}: {len(names)} parameters" for name, names in parts]
        return ", ".join([*stages, f"untrained: {len(self.untrained)}"])


def as_arguments(inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (inputs, keywords); a dict of keyword inputs, given as the only input, joins the keywords."""
    return (None, {**inputs, **keywords}) if isinstance(inputs, Mapping) else (inputs, keywords)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor in a module's output. Raises ValueError if there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"at must name modules whose output is or begins with a tensor, not {type(output).__name__}")
