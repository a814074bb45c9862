"""The one-pass step of `StackedHeads`: one kernel along the cascade, and one product for all stages' gradients."""

import torch
from torch import Tensor

from sid_kernels import CascadeWeights, refine_cascade_and_grad

from ..network.heads import StackedHeads
from .common import StepOptions, owned_parameters
from .updates import Optimizers, clear_gradients, update


def train_stacked(
    heads: StackedHeads, features: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Train all stages at once on features (B, D), with the results of `stage_by_stage`.

    Returns the losses (L,), the last stage's logits (B, C) and the gradient of the features (B, D).
    """
    weights, reused = heads.weights, reusable_gradients(heads, optimizers)
    if reused is None:
        clear_gradients(optimizers)
    if features.is_cuda and options.dtype is not torch.float32:  # on a CPU the float32 kernel is faster
        features, weights = features.to(options.dtype), CascadeWeights(*(w.to(options.dtype) for w in weights))
    result, dfeatures, gradients = refine_cascade_and_grad(
        features, weights, targets, options.cascade_alpha(len(heads), features), out=reused, **options.loss
    )
    if reused is None:
        for weight, gradient in zip(heads.weights, gradients, strict=True):
            if weight.requires_grad:
                gradient = gradient.to(weight.dtype)
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    update(optimizers)
    return result.stage_loss, result.logits, dfeatures


def reusable_gradients(heads: StackedHeads, optimizers: Optimizers) -> CascadeWeights | None:
    """Return the heads' gradients if the step may overwrite them: on a CPU, if the optimizers own all; otherwise None.

    New memory for them would be mapped page by page at every step, which takes as long as the kernel. On a GPU the
    caching allocator gives the same memory again.
    """
    owned = owned_parameters(optimizers)
    gradients = [w.grad for w in heads.weights if w.is_cpu and w.grad is not None and id(w) in owned]
    return CascadeWeights(*gradients) if len(gradients) == 4 and all(g.is_contiguous() for g in gradients) else None
