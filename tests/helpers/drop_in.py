"""A small network of either class, its data, and the plain loop that frameworks are compared with."""

import torch
from torch import nn

from sid_trainer import SIDNetwork, cut

STEPS, BATCH, CLASSES = 4, 16, 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = STEPS * BATCH
    inputs = torch.randn(count, 12, generator=generator)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def make(kind: str, seed: int = 0):
    """Return three stages on blocks 0, 2 and 4: a `CutNetwork` for "names", a `SIDNetwork` for "indices"."""
    torch.manual_seed(seed)
    layers = [part for width in (12, 32, 32) for part in (nn.Linear(width, 32), nn.ReLU())]
    example = torch.zeros(2, 12)
    return cut(nn.Sequential(*layers), ["1", "3", "5"] if kind == "names" else [2, 4], CLASSES, example)


def train(network, optimizer, *, parts=1, clip=None, dtype=None, scaler=None, call=None) -> None:
    """Take one step per whole batch, over `parts` micro-batches.

    clip: the largest norm of the gradients. dtype: of the autocast. call: a wrapper of `network` to call instead.
    """
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for inputs, targets in zip(*(part.split(BATCH) for part in data()), strict=True):
        optimizer.zero_grad()
        for part in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = (call or network)(*part).loss / parts
            scaler.scale(loss).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


def assert_same_weights(network, other, *, exact: bool = False, rtol: float = 1e-4) -> None:
    """Check that two networks have the same weights, and that the weights have moved.

    rtol: of the Euclidean norm of each parameter's change since `make`.
    """
    start = make("indices" if isinstance(other, SIDNetwork) else "names").parameters()
    for (name, own), its, before in zip(network.named_parameters(), other.parameters(), start, strict=True):
        own, its = whole(own), whole(its)
        if exact:
            assert torch.equal(own, its), name
        else:
            assert (own - its).norm() <= rtol * (its - before).norm(), name


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter that may be sharded, detached."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def train_steps(network, inputs, targets, steps, lr=1e-3):
    """Take steps on one batch by Adam; return the first and the last losses of the stages (L,)."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = network(inputs, targets)
        output.loss.backward()
        optimizer.step()
        losses.append(output.stage_loss)
    return losses[0], losses[-1]
