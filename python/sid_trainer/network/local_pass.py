"""A forward pass that trains every stage: losses and gradients are computed in it, and `backward` hands them out."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from sid_kernels import (
    CascadeWeights,
    PriorHead,
    fused_belief_head,
    local_loss_and_grad,
    refine_cascade,
    refine_cascade_and_grad,
)
from sid_kernels.core.autograd import autocast_dtype
from sid_kernels.core.options import HALF, compute_dtype

from .loss_options import StageLossOptions

extra_losses: list[Tensor] | None = None  # of the stage that runs; None outside of a training pass


class LocalOutput(NamedTuple):
    """What a network returns when it is called with targets."""

    loss: Tensor  # (), the sum of the stages' losses; `backward` hands every parameter its stage's gradient
    logits: Tensor  # (B, C), (B, T, C), (B, C, T) or (B, C, H, W) of the last stage, detached
    stage_loss: Tensor  # (L,), detached


def add_stage_loss(loss: Tensor) -> None:
    """Add a scalar to the loss of the stage that runs, for example a mixture's balance loss.

    Call it inside a module of the network. A term of the extractor counts for the first stage. It has no effect in a
    pass without targets. Raises ValueError for anything but a scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.dim():
        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a scalar tensor, not {given}")
    if extra_losses is not None:
        extra_losses.append(loss)


@contextmanager
def collect_terms() -> Iterator[list[Tensor]]:
    """Yield the list to which `add_stage_loss` appends its terms within the context."""
    global extra_losses
    outer, extra_losses = extra_losses, []
    try:
        yield extra_losses
    finally:
        extra_losses = outer


def take_terms(terms: list[Tensor]) -> list[Tensor]:
    """Return the terms added so far, and clear the list."""
    added = list(terms)
    terms.clear()
    return added


def add_terms(loss: Tensor, terms: Iterable[Tensor]) -> Tensor:
    """Return a loss () plus the detached terms."""
    for term in terms:
        loss = loss + term.detach().to(loss.dtype)
    return loss


class LocalPass:
    """The losses and gradients of the stages that have run in one pass.

    Args:
        targets: Classes (...), int64, or probabilities (..., C).
        options: The stages' losses.
        depth: Number of stages L.
    """

    def __init__(self, targets: Tensor, options: StageLossOptions, depth: int):
        self.targets, self.options = targets, options
        self.alphas = options.stage_alphas(depth)
        self.losses: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor]] = []  # parameter, gradient

    def __enter__(self) -> "LocalPass":
        self.context = collect_terms()
        self.terms = self.context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.__exit__(None, None, None)

    def learn(
        self, logits: Tensor, prior: Tensor, parameters: Iterable[Tensor], features: Tensor | None = None
    ) -> Tensor:
        """Compute the next stage's loss and its gradients, and return its belief (..., C).

        The stage's graph is freed.

        Args:
            logits, prior: (..., C) of the stage.
            parameters: All that the stage trains.
            features: A leaf that several stages read, whose `.grad` sums their gradients.
        """
        extra = take_terms(self.terms)
        with torch.autocast(logits.device.type, enabled=False):
            parameters = list(parameters)
            scale = float16_scale(logits.dtype, logits.shape[:-1].numel(), parameters)
            logits = logits.float() if logits.dtype is torch.float16 else logits
            i = len(self.losses)
            terms, weight = self.options.loss_of_stage(i), self.options.class_weight
            loss, belief, dlogits = stage_loss(logits, prior, self.targets, self.alphas[i], terms, weight)
            self.losses.append(add_terms(loss, extra))
            outputs, output_gradients = [logits, *extra], [dlogits * scale if scale != 1 else dlogits]
            output_gradients += [torch.full_like(term, scale) for term in extra]
            self.collect(outputs, output_gradients, parameters, features, scale)
        return belief

    def learn_readout(
        self, head: tuple[Tensor, Tensor, Tensor | None], prior: PriorHead | None, parameters: Iterable[Tensor]
    ) -> None:
        """Do what `learn` does for a stage whose logits are not held: hidden (N, D), weight (C, D) and bias, or None.

        `prior` is the head of the stage before.
        """
        extra, i = take_terms(self.terms), len(self.losses)
        terms = self.options.loss_of_stage(i)
        loss = fused_belief_head(*head, prior, self.targets, self.alphas[i], return_belief=False, **terms).loss
        self.losses.append(add_terms(loss.detach(), extra))
        parameters, dtype = list(parameters), autocast_dtype(head[0]) or head[0].dtype
        scale = float16_scale(dtype, len(head[0]), parameters)
        with torch.autocast(loss.device.type, enabled=False):
            outputs = [loss, *extra]
            self.collect(outputs, [torch.full_like(x, scale) for x in outputs], parameters, scale=scale)

    def learn_cascade(self, features: Tensor, weights: CascadeWeights) -> Tensor:
        """Do what `learn` does for all stages of `StackedHeads` at once, and return the last logits (B, C)."""
        if self.options.class_weight is not None:
            raise ValueError("class_weight must be None for StackedHeads; build the network with fused=False")
        alpha = self.options.cascade_alpha(len(weights[0]), features)
        leaf, kernel_weights, device = features, weights, features.device.type
        bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
        if features.is_cuda and bfloat16:
            features, kernel_weights = features.bfloat16(), CascadeWeights(*(weight.bfloat16() for weight in weights))
        if not torch.is_grad_enabled():
            result = refine_cascade(features, kernel_weights, self.targets, alpha, **self.options.loss)
        else:
            result, dfeatures, gradients = refine_cascade_and_grad(
                features, kernel_weights, self.targets, alpha, **self.options.loss
            )
            if dfeatures is not None and leaf.requires_grad:
                leaf.grad = dfeatures.to(leaf.dtype)
            for weight, gradient in zip(weights, gradients, strict=True):
                if weight.requires_grad:
                    self.gradients.append((weight, gradient.to(weight.dtype)))
        self.losses.extend(result.stage_loss)
        return result.logits

    def collect(
        self, outputs: Sequence[Tensor], output_gradients: Sequence[Tensor], parameters: Iterable[Tensor],
        features: Tensor | None = None, scale: float = 1.0,
    ) -> None:  # fmt: skip
        """Compute the parameters' gradients from those of `outputs`, which are `scale` times too large."""
        pairs = [(x, g) for x, g in zip(outputs, output_gradients, strict=True) if x.requires_grad]
        leaves = [parameter for parameter in parameters if parameter.requires_grad]
        leaves += [features] if features is not None and features.requires_grad else []
        if not pairs or not leaves:  # a frozen stage
            return
        heads, output_gradients = zip(*pairs, strict=True)
        if any(map(is_sharded, leaves)):
            gradients = backward_through_shards(heads, output_gradients, leaves)
        else:
            with without_tensor_hooks(leaves):
                gradients = list(torch.autograd.grad(heads, leaves, output_gradients, allow_unused=True))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient / scale if scale != 1 else gradient
            if leaf is features:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            else:
                self.gradients.append((leaf, gradient))

    def output(self, logits: Tensor) -> LocalOutput:
        """Return the losses, and the loss that carries all gradients."""
        losses = torch.stack(self.losses)
        loss = losses.sum()
        if self.gradients:
            parameters, gradients = zip(*self.gradients, strict=True)
            loss = HandOut.apply(loss, list(gradients), *parameters)
        return LocalOutput(loss, logits.detach(), losses)


@contextmanager
def without_tensor_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Suspend hooks of `Tensor.register_hook` on the leaves: they run when `loss.backward()` hands gradients out."""
    hooks = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for current, _ in hooks:
        current.clear()
    try:
        yield
    finally:
        for current, saved in hooks:
            current.update(saved)


def float16_scale(dtype: torch.dtype, rows: int, parameters: Iterable[Tensor]) -> float:
    """Return the factor for gradients inside a module that computes in `dtype` and learns from a mean over `rows`.

    It brings the gradient of the output from 1/rows, which float16 would round, to about 1. A larger factor would
    overflow if activations are large, and a GradScaler could not lower it. Ranks that share parameters use the same.
    """
    if dtype is not torch.float16:
        return 1.0
    return 2.0**8 if any(map(is_sharded, parameters)) else 2.0 ** min(15, rows.bit_length() - 1)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether `fully_shard` divides a parameter among processes."""
    return hasattr(parameter, "to_local")


def warn_of_input_gradients(inputs: Any) -> None:
    """Warn if an input requires a gradient: a pass returns none, so that what computed the input is not trained."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs)):
        warnings.warn(
            "inputs that require a gradient get none from a call with targets: compute them within the model",
            stacklevel=5,  # the caller of the network
        )


def reshard(network: nn.Module) -> None:
    """Shard again what `fully_shard` left gathered after an evaluation, so that `parameters()` are sharded ones."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def backward_through_shards(
    outputs: Sequence[Tensor], output_gradients: Sequence[Tensor], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of leaves that `fully_shard` shards; it reduces them in a backward that fills `.grad`."""
    saved = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(outputs, output_gradients)
    gradients = [leaf.grad for leaf in leaves]
    for leaf, gradient in zip(leaves, saved, strict=True):
        leaf.grad = gradient
    if all(gradient is None for gradient in gradients):
        raise RuntimeError("set_requires_gradient_sync must be True: a pass reduces the gradients of its stages itself")
    return gradients


def stage_loss(
    logits: Tensor, prior: Tensor, targets: Tensor, alpha: float | Tensor, terms: dict[str, Any],
    class_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss () of a stage, its belief (..., C), and the gradient of its logits (..., C).

    `terms` are those of `StageLossOptions.loss_of_stage`; `class_weight` is (C,). Raises ValueError for another size.
    """
    if class_weight is None:
        result, dlogits = local_loss_and_grad(logits, prior, targets, alpha, **terms)
        assert result.belief is not None  # for type checkers
        return result.loss, result.belief, dlogits
    result, dlogits = local_loss_and_grad(logits, prior, targets, alpha, reduction="none", **terms)
    weight = class_weight.to(result.loss)
    if len(weight) != logits.shape[-1]:
        raise ValueError(f"class_weight must have {logits.shape[-1]} entries, one per class, not {len(weight)}")
    if targets.is_floating_point():
        weights = targets.to(weight.dtype) @ weight
    else:
        counted = targets != terms["ignore_index"]
        weights = weight[targets.where(counted, 0)] * counted
    weights = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)  # 0 if every row is ignored
    assert result.belief is not None
    return (result.loss * weights).sum(), result.belief, (dlogits * weights.unsqueeze(-1)).to(dlogits.dtype)


class HandOut(torch.autograd.Function):
    """The loss as a function of parameters whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("loss.backward() has handed out its gradients; call the network again")
        if factor.is_cpu and factor == 1:
            return None, None, *gradients
        scaled = []
        while gradients:  # not in place, as parameters may share a gradient's memory; one by one, to free each
            scaled.append(gradients.pop() * factor)
        return None, None, *reversed(scaled)


def uniform_belief(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return the belief of `shape` (..., C) whose entries are 1/C, on the device of `like`, float32 or float64."""
    return torch.full(shape, 1 / shape[-1], dtype=compute_dtype(like), device=like.device)


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the labels (B, T) of the next tokens; the last one is ignored. Raises ValueError for other targets."""
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(f"targets must be labels (B, T) with shift, not {tuple(labels.shape)} {labels.dtype}")
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32, others as they are.

    Beliefs and shared features stay in float32 under autocast because they are summed over all stages.
    """
    return tensor.float() if tensor.dtype in HALF else tensor
