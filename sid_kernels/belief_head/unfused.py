"""A belief head with all logits at once, for what the fused passes do not take.

That is torch.func transforms, forward-mode differentiation, and a batch of incoming gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.autograd import is_compiling, transforming, wants_grad
from ..local_loss import torch_op
from ..local_loss.functional import call_transformed
from ..local_loss.problem import LocalLoss
from ..local_loss.sharded import check_sharded, is_sharded
from .problem import LinearLayer, NeedGrad, PriorHead, belief_dtype


def unfused_head(
    layer: LinearLayer, prior: Tensor | PriorHead | None, target: Tensor, alpha: float | Tensor, options: tuple,
    return_belief: bool, backend: str,
) -> LocalLoss:  # fmt: skip
    """Return the result of a linear layer and the local loss; options: the arguments of `LossOptions`."""
    if isinstance(prior, tuple):
        head = PriorHead(*prior)
        dtype = belief_dtype(layer.hidden.dtype, head, options[0] == "reverse")
        prior = F.linear(*head).softmax(-1, dtype=dtype).detach()
    sharded = is_sharded(*layer, target)
    run = torch_op.call if transforming() or sharded else call_transformed
    loss, belief, fidelity, consistency, _ = run(F.linear(*layer), prior, target, alpha, options, backend)
    return LocalLoss(loss, belief if return_belief else None, fidelity, consistency)


def sharded_head(layer: LinearLayer, prior: Tensor | PriorHead | None, target: Tensor) -> bool:
    """Return whether the inputs of a head are DTensors.

    Raises:
        TypeError: some are and some are not, as the weight of a module under fully_shard outside its forward.
    """
    hidden, weight, bias = layer
    if is_compiling() or not is_sharded(*layer, *(prior if isinstance(prior, tuple) else (prior,)), target):
        return False
    others = {"weight": weight, "bias": bias, "target": target}
    if isinstance(prior, tuple):
        others |= {f"prior.{name}": x for name, x in zip(PriorHead._fields, prior, strict=False)}
    check_sharded("hidden", hidden, others if isinstance(prior, tuple) else others | {"prior": prior})
    return True


def batch_of_gradients(layer: LinearLayer, arguments: tuple, need: NeedGrad, grad_loss: Tensor) -> list[Tensor | None]:
    """Return the gradients of `layer` for a batch of incoming gradients; arguments: the others of `unfused_head`."""
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(layer, need, strict=True)]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        loss = unfused_head(LinearLayer(hidden, weight, bias), *arguments).loss
        wanted = [x for x in leaves if x is not None and wants_grad(x)]
        gradients = iter(torch.autograd.grad(loss, wanted, grad_loss))
    return [next(gradients) if wanted else None for wanted in need]
