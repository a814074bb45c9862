"""Equal stages in one memory: what `sid_kernels.refine_cascade` trains at once stays, to its user, one module a stage.

The parameters of L equal stages lie one behind the other in four stacked tensors; every stage's own parameters are that
memory too, each as if it had it for itself. They are read, changed, loaded and saved stage by stage as ever.
"""

import weakref

import torch
from torch import Tensor, nn

from sid_kernels import CascadeWeights

from .network import BeliefHead, SIDNetwork, Stage


class StackedStages:
    """The stacked parameters of a network's stages, as leaf parameters an optimizer can own, and their gradients."""

    def __init__(self, parts: list[list[nn.Parameter]]):
        self.ids = [list(map(id, part)) for part in parts]
        self.parts = parts  # four lists, in CascadeWeights' order, of one parameter a stage
        self.weights = CascadeWeights(*(nn.Parameter(torch.stack([p.detach() for p in part])) for part in parts))
        self.gradients = CascadeWeights(*(torch.empty_like(w) for w in self.weights))
        self.views = [[_own_view(x, i) for i in range(len(x))] for x in self.weights]
        self.gradient_views = [[_own_view(x, i) for i in range(len(x))] for x in self.gradients]
        self.bind()

    def parameters(self) -> CascadeWeights:
        """(L, ...) each: what one optimizer updates in place of L; the same numbers, for any update by element."""
        return self.weights

    def bind(self) -> None:
        """Where a stage's parameter lies elsewhere (moved, loaded by assignment), take its values back in."""
        for part, views in zip(self.parts, self.views, strict=True):
            for parameter, view in zip(part, views, strict=True):
                if parameter.data_ptr() != view.data_ptr():
                    view.copy_(parameter.detach())
                    parameter.data = view

    def is_of(self, parts: list[list[nn.Parameter]]) -> bool:
        return [list(map(id, part)) for part in parts] == self.ids

    def fits(self) -> bool:
        """Whether the stages' parameters are still of the stacked ones' kind."""
        return all(
            p.shape == view.shape and p.dtype is view.dtype and p.device == view.device
            for part, views in zip(self.parts, self.views, strict=True)
            for p, view in zip(part, views, strict=True)
        )

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
    if known is not None and known.is_of(parts) and known.fits():
        known.bind()
    else:
        known = _known[network] = StackedStages(parts)
    return known


_known: weakref.WeakKeyDictionary[SIDNetwork, StackedStages] = weakref.WeakKeyDictionary()


def _parts(network: SIDNetwork) -> list[list[nn.Parameter]] | None:
    """The parameters by kind, where every stage is a `Stage` of a `BeliefHead` on the features themselves."""
    parts, like = [[], [], [], []], None
    for stage in network.stages:
        head = stage.head
        if type(stage) is not Stage or type(head) is not BeliefHead or type(stage.body) is not nn.Identity:
            return None
        hidden, logits = head.hidden, head.logits
        modules = (stage, stage.body, head, hidden, head.relu, logits)
        if type(hidden) is not nn.Linear or type(logits) is not nn.Linear or any(map(_hooked, modules)):
            return None
        found = (hidden.weight, hidden.bias, logits.weight, logits.bias)
        like = like or found
        for parameter, first, part in zip(found, like, parts, strict=True):
            if type(parameter) is not nn.Parameter or not parameter.requires_grad or parameter.shape != first.shape:
                return None
            if parameter.dtype is not torch.float32 or parameter.device != first.device or parameter._backward_hooks:
                return None
            part.append(parameter)
    return parts if like else None


def _hooked(module: nn.Module) -> bool:
    """Hooks see a module's calls, and here it is not called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _own_view(stacked: Tensor, i: int) -> Tensor:
    """Entry i of a contiguous tensor as memory of its own: a file it is saved in holds this entry only."""
    entry = stacked.detach()[i]
    start = entry.storage_offset() * entry.element_size()
    memory = stacked.untyped_storage()[start : start + entry.numel() * entry.element_size()]
    return torch.empty(0, dtype=stacked.dtype, device=stacked.device).set_(memory, 0, entry.shape, entry.stride())
