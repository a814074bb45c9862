"""Test `capture`: on a GPU the step as a CUDA graph, elsewhere the step itself after the same checks."""

import copy

import pytest
import torch
from torch.optim import SGD, Adam, NAdam
from torch.optim.lr_scheduler import LambdaLR

from sid_trainer import build_network, capture, sid_step
from sid_trainer.methods.capture import _Snapshot

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device, kind=Adam, **options):
    torch.manual_seed(0)
    network = build_network("simple_cnn", num_classes=10, in_channels=1, depth=4).to(device)
    optimizers = [kind(network.extractor.parameters(), lr=1e-2, **options)]
    optimizers.append(kind(network.stages.parameters(), lr=1e-2, **options))
    return network, optimizers


def batches(device, number):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
        yield images.to(device), labels.to(device)


@pytest.fixture
def deterministic():
    """Make sums deterministic: Adam turns the least difference into a whole step."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "options"), [(Adam, {"fused": True}), (SGD, {"momentum": 0.9, "fused": True})], ids=["adam", "sgd"]
)
def test_replays_are_the_steps(device, kind, options, deterministic):
    """Replay with new data and a new learning rate each time, by a scheduler and by assignment; compare parameters."""
    ends = []
    for captured in (False, True):
        network, optimizers = make(device, kind, **options)
        before = copy.deepcopy(network.state_dict())

        def step(images, labels, network=network, optimizers=optimizers):
            return sid_step(network, images, labels, 0.5, optimizers)

        call = step
        if captured:
            call = capture(step, next(batches(device, 1)), network=network, optimizers=optimizers)
            for name, value in network.state_dict().items():
                assert torch.equal(value, before[name]), f"capturing changed {name}"
        schedule = LambdaLR(optimizers[1], lambda epoch: 0.5**epoch)
        losses = []
        for i, batch in enumerate(batches(device, 4)):
            optimizers[0].param_groups[0]["lr"] = 1e-2 / (1 + i)
            losses.append(call(*batch).stage_loss.clone())
            schedule.step()
        ends.append((torch.stack(losses), {name: x.clone() for name, x in network.state_dict().items()}))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-5)
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3, 2),), r"batch must be 2 tensors like the example's, not 1"),
        (
            (torch.zeros(3, 2), torch.zeros(4)),
            r"batch\[1\] must be \(3,\) torch.float32 as captured, not \(4,\) torch.float32",
        ),
        ((torch.zeros(3, 2).int(), torch.zeros(3)), r"batch\[0\] must be .*, not \(3, 2\) torch.int32"),
        ((torch.zeros(3, 2), None), r"batch\[1\] must be .*, not NoneType"),
    ],
)
def test_a_batch_unlike_the_example_is_refused(batch, message):
    call = capture(lambda x, y: x, (torch.zeros(3, 2), torch.zeros(3)))
    with pytest.raises(ValueError, match=message):
        call(*batch)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: SGD(p, lr=0.1), "fused=True; one is SGD without it"),
        (lambda p: NAdam(p, lr=0.1), "fused=True; one is NAdam"),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True), "dampening 0"),
    ],
)
def test_optimizers_that_cannot_be_undone_or_captured_are_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        capture(lambda x: x, (torch.zeros(2),), optimizers=[optimizer([torch.nn.Parameter(torch.zeros(2))])])


def test_what_a_snapshot_puts_back():
    """Check that the runs before a capture are undone: parameters, all buffers, states old and new."""
    for warm in (False, True):
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        twin = copy.deepcopy(network)
        ends = []
        for n, undone in ((network, True), (twin, False)):
            torch.manual_seed(0)
            optimizer = Adam(n.parameters(), lr=0.1, fused=True)

            def step(n=n, optimizer=optimizer):
                optimizer.zero_grad()
                n(torch.linspace(0, 1, 15).view(5, 3).square()).square().sum().backward()
                optimizer.step()

            if warm:
                step()
            if undone:
                before = _Snapshot(n, (optimizer,))
                step()
                step()
                before.restore()
            step()
            ends.append(n.state_dict())
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_example_must_be_tensors():
    with pytest.raises(ValueError, match="example_batch must be tensors, at least one"):
        capture(lambda: None, ())
    with pytest.raises(ValueError, match="example_batch must be tensors, at least one, not .*float"):
        capture(lambda x: None, (0.5,))
