"""Equal stages in one memory: what `sid_kernels.refine_cascade` trains at once stays, to its user, one module a stage.

The parameters of L equal stages lie one behind the other in four stacked tensors; every stage's own parameters are that
memory too, each as if it had it for itself. They are read, changed, loaded and saved stage by stage as ever.
"""

import weakref

import torch
from torch import Tensor, nn

from sid_kernels import CascadeWeights, refine_cascade_and_grad

from ..network.heads import StageHead
from ..network.modules import SIDNetwork, Stage
from .common import Optimizers, StepOptions, update


class StackedStages:
    """The stacked parameters of a network's stages, as leaf parameters an optimizer can own, and their gradients."""

    def __init__(self, parts: list[list[nn.Parameter]]):
        self.parts = parts  # four lists, in CascadeWeights' order, of one parameter a stage
        self.weights = CascadeWeights(*(nn.Parameter(torch.stack([p.detach() for p in part])) for part in parts))
        self.gradients = CascadeWeights(*(torch.empty_like(w) for w in self.weights))
        self.gradient_views = [[_own_view(x, i) for i in range(len(x))] for x in self.gradients]
        self.addresses = [[x[i].data_ptr() for i in range(len(x))] for x in self.weights]
        self.bind()

    def parameters(self) -> CascadeWeights:
        """(L, ...) each: what one optimizer updates in place of L; the same numbers, for any update by element.

        Such an optimizer is handed to `sid_step`, which gives these their gradients; without it the gradients are in
        the stages' own `.grad` alone.
        """
        return self.weights

    def holds(self, parts: list[list[nn.Parameter]]) -> bool:
        """Whether these are its stages' parameters, still of the stacked ones' kind."""
        return len(parts[0]) == len(self.parts[0]) and all(
            p is own and p.shape == stacked.shape[1:] and p.dtype is stacked.dtype and p.device == stacked.device
            for part, owns, stacked in zip(parts, self.parts, self.weights, strict=True)
            for p, own in zip(part, owns, strict=True)
        )

    def bound(self, parts: list[list[nn.Parameter]]) -> bool:
        """Whether these are its stages' parameters and lie in the stacked memory: so at every step but the first."""
        return all(
            p is own and p.data_ptr() == address
            for part, owns, addresses in zip(parts, self.parts, self.addresses, strict=True)
            for p, own, address in zip(part, owns, addresses, strict=False)
        ) and len(parts[0]) == len(self.addresses[0])

    def bind(self) -> None:
        """Where a stage's parameter lies elsewhere (moved, shared with a process), take its values back in."""
        for part, stacked, addresses in zip(self.parts, self.weights, self.addresses, strict=True):
            for i, (parameter, address) in enumerate(zip(part, addresses, strict=True)):
                if parameter.data_ptr() != address:
                    view = _own_view(stacked, i)
                    view.copy_(parameter.detach())
                    parameter.data = view

    def show_gradients(self) -> None:
        """Every stage's `.grad` is its part of the stacked gradients."""
        for part, views in zip(self.parts, self.gradient_views, strict=True):
            for parameter, view in zip(part, views, strict=True):
                if parameter.grad is not view:
                    parameter.grad = view

    def add_gradients(self, found: CascadeWeights) -> None:
        """Adds to every stage's `.grad`, as `backward` does."""
        for part, stacked in zip(self.parts, found, strict=True):
            for parameter, gradient in zip(part, stacked.unbind(), strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad += gradient


def stacked_stages(network: SIDNetwork) -> StackedStages | None:
    """The network's stages stacked, now if they were not; None where they are not equal plain stages of one kind."""
    parts = _parts(network)
    if parts is None:
        return None
    known = _known.get(network)
    if known is not None and known.bound(parts):
        return known
    with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
        if known is not None and known.holds(parts):
            known.bind()
        else:
            known = _known[network] = StackedStages(parts)
    return known


_known: weakref.WeakKeyDictionary[SIDNetwork, StackedStages] = weakref.WeakKeyDictionary()


def _parts(network: SIDNetwork) -> list[list[nn.Parameter]] | None:
    """The parameters by kind, where every stage is a `Stage` of a `StageHead` on the features themselves.

    This runs at every step, so it reads modules' dictionaries: looking names up in modules would take three times as
    long as the rest.
    """
    parts, first = [[], [], [], []], None
    for stage in network.stages._modules.values():
        if type(stage) is not Stage:
            return None
        body, head = stage._modules["body"], stage._modules["head"]
        if type(body) is not nn.Identity or type(head) is not StageHead:
            return None
        pooling, hidden, relu, deeper, logits = head._modules.values()
        if type(hidden) is not nn.Linear or type(logits) is not nn.Linear or type(relu) is not nn.ReLU:
            return None
        if type(pooling) is not nn.Identity or type(deeper) is not nn.Sequential or deeper._modules:
            return None
        for m in (
            stage,
            body,
            head,
            pooling,
            hidden,
            relu,
            deeper,
            logits,
        ):  # hooks see a module's calls, and here it is not called
            hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            if hooked or "forward" in m.__dict__:
                return None
        own, last = hidden._parameters, logits._parameters
        found = (own.get("weight"), own.get("bias"), last.get("weight"), last.get("bias"))
        first = first or found
        for parameter, like, part in zip(found, first, parts, strict=True):
            if type(parameter) is not nn.Parameter or not parameter.requires_grad:
                return None
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return None
            if parameter.dtype is not torch.float32 or parameter.shape != like.shape or parameter.device != like.device:
                return None
            part.append(parameter)
    distinct = {id(parameter) for part in parts for parameter in part}
    return parts if first and len(distinct) == 4 * len(parts[0]) else None  # a stage in two places has two gradients


def _own_view(stacked: Tensor, i: int) -> Tensor:
    """Entry i of a contiguous tensor as memory of its own: a file it is saved in holds this entry only."""
    entry = stacked.detach()[i]
    start = entry.storage_offset() * entry.element_size()
    memory = stacked.untyped_storage()[start : start + entry.numel() * entry.element_size()]
    return torch.empty(0, dtype=stacked.dtype, device=stacked.device).set_(memory, 0, entry.shape, entry.stride())


def fused_stages(
    stacked: StackedStages,
    features: Tensor,
    targets: Tensor,
    options: StepOptions,
    optimizers: Optimizers,
    at_once: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers for equal plain stages, from one kernel along the cascade and one product for all stages; also
    the gradient of the features."""
    alphas, dtype = options.stage_alphas(len(stacked.parts[0])), options.dtype
    if any(isinstance(alpha, Tensor) for alpha in alphas):
        alphas = torch.stack([a if isinstance(a, Tensor) else features.new_full((), a) for a in alphas])
    weights = stacked.weights
    if features.is_cuda and dtype is not torch.float32:  # on a CPU the kernel in float32 is the faster one
        features, weights = features.to(dtype), CascadeWeights(*(w.to(dtype) for w in weights))
    out = stacked.gradients if optimizers and weights is stacked.weights else None
    result, dfeatures, gradients = refine_cascade_and_grad(features, weights, targets, alphas, out=out, **options.loss)
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
