"""The step of a network cut by names: the ordinary loop around its loss."""

from torch import Tensor

from ..network.cut_network import CutNetwork
from .common import StepOptions, StepResult, autocast, forward_dtype
from .updates import Optimizers, clear_gradients, update


def drop_in_step(
    network: CutNetwork, inputs: Tensor, targets: Tensor, options: StepOptions, optimizers: Optimizers = ()
) -> StepResult:
    """Call the network with targets, the `backward` of its loss, and the optimizers, as your own loop would."""
    network.loss_options = options
    clear_gradients(optimizers)
    with forward_dtype(inputs, options.dtype) as dtype:
        with autocast(inputs, dtype):
            output = network(inputs, targets)
        output.loss.backward()
        update(optimizers)
    return StepResult(output.stage_loss, output.logits)
