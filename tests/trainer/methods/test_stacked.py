"""Test that StackedHeads give the numbers of one module per stage, in every schedule and method."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from helpers.stages import gradients, values
from sid_kernels.cascade import cpu as cascade_cpu
from sid_trainer import SIDNetwork, StackedHeads, Stage, StageHead, build_network, sid_step
from sid_trainer.methods.baselines import bp_step, deep_supervision_step

ROUNDING = 2e-5  # of a parameter's largest gradient: float32 sums of a few thousand terms in another order


def make(depth=5, dim=16, classes=10, rows=24, fused=True, hidden_dim=32):
    torch.manual_seed(0)
    if fused:
        stages = StackedHeads(depth, dim, classes, hidden_dim)
    else:
        stages = [Stage(StageHead(dim, classes, hidden_dim)) for _ in range(depth)]
    network = SIDNetwork(nn.Linear(12, dim), stages, classes)
    return network, torch.randn(rows, 12), torch.randint(0, classes, (rows,))


def optimizers(network, kind=SGD, **options):
    return [kind(module.parameters(), **options) for module in network.local_modules]


def assert_near(actual, expected, rounding=ROUNDING):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= rounding * value.abs().max(), name


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("alpha", [0.5, [0.9, 0.7, 0.5, 0.3, 0.1], torch.tensor(0.3), [torch.tensor(0.3), 0.5, 1, 0, 1]],
                         ids=str)  # fmt: skip
def test_gradients_and_losses_are_those_of_stage_by_stage(classes, alpha):
    results = []
    for fused in (True, False):
        network, inputs, targets = make(classes=classes, fused=fused)
        results.append((sid_step(network, inputs, targets, alpha), gradients(network)))
    (result, actual), (expected, wanted) = results
    torch.testing.assert_close(result.stage_loss, expected.stage_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert_near(actual, wanted)


def test_soft_targets_and_gradients_that_add_up():
    network, inputs, _ = make()
    plain, _, _ = make(fused=False)
    targets = torch.rand(24, 10).softmax(-1)
    for _ in range(2):
        sid_step(network, inputs, targets)
        sid_step(plain, inputs, targets)
    assert_near(gradients(network), gradients(plain))


STEPS = {
    "one-pass": partial(sid_step, fused=False),
    "two-phase": partial(sid_step, schedule="two-phase"),
    "reference": partial(sid_step, schedule="reference"),
    "bfloat16": partial(sid_step, fused=False, dtype=torch.bfloat16),
    "bp": bp_step,
    "bp-checkpoint": partial(bp_step, checkpointed=True),
    "bp-accumulate": partial(bp_step, parts=3),
    "deep-supervision": deep_supervision_step,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"lr": 1e-2}),
        (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        (None, {}),
    ],
    ids=["adam", "adamw", "sgd", "gradients"],
)
def test_steps_that_run_stages_one_by_one_have_the_bits_of_modules(name, kind, options):
    """Compare parameters with optimizers, and without them gradients, which add up."""
    ends = []
    for fused in (True, False):
        network, inputs, targets = make(fused=fused)
        if name in ("one-pass", "two-phase", "bfloat16"):
            owners = optimizers(network, kind, **options) if kind else ()
        else:
            owners = [kind(network.parameters(), **options)] if kind else ()
        for _ in range(3):
            result = STEPS[name](network, inputs, targets, optimizers=owners)
        ends.append(result._asdict() | (values(network) if kind else gradients(network)))
    assert_equal(*ends)


def test_equal_bits_run_to_run():
    ends = []
    for _ in range(2):
        network, inputs, targets = make(rows=100)
        owners = optimizers(network, Adam, lr=1e-2, fused=True)
        for _ in range(3):
            result = sid_step(network, inputs, targets, 0.5, owners)
        ends.append(values(network) | {"losses": result.stage_loss})
    assert_equal(*ends)


def double_and_back(network):
    return network.double().float()


def to_device_and_back(network):
    for parameter in network.parameters():  # what `.to` does between two devices
        parameter.data = parameter.data.clone()
    return network.to("cpu", memory_format=torch.channels_last)


def shared_memory(network):
    return network.share_memory()


def assigned(network):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_()


@pytest.mark.parametrize("move", [copy.deepcopy, double_and_back, to_device_and_back, shared_memory, assigned])
def test_steps_after_a_move_are_those_of_modules(move):
    """Move the parameters' memory between steps, and compare gradients and weights with the unfused path."""
    networks, batches = [], []
    for fused in (True, False):
        network, *batch = make(fused=fused)
        batches.append(batch)
        networks.append(network)
    for moved in (False, True):
        if moved:
            networks = [move(network) for network in networks]
        owners = [optimizers(network, SGD, lr=0.1, momentum=0.9) for network in networks]
        for _ in range(3):
            for network, batch, own in zip(networks, batches, owners, strict=True):
                sid_step(network, *batch, 0.5, own)
            assert_near(*map(gradients, networks), rounding=1e-4)
            for name, value in values(networks[1]).items():
                torch.testing.assert_close(values(networks[0])[name], value, rtol=1e-5, atol=1e-6)


def test_a_copy_shares_nothing():
    network, inputs, targets = make()
    sid_step(network, inputs, targets)
    twin, before = copy.deepcopy(network), values(network) | {"grad": network.stages.hidden_bias.grad.clone()}
    sid_step(twin, inputs, targets, 0.5, optimizers(twin, SGD, lr=0.1))
    assert_equal(values(network) | {"grad": network.stages.hidden_bias.grad}, before)
    assert not torch.equal(twin.stages.hidden_bias, network.stages.hidden_bias)


@pytest.mark.parametrize("between", ["nothing", "set to None", "zeroed", "not contiguous"])
def test_gradients_of_the_step_before_do_not_matter(between):
    network, inputs, targets = make()
    owners = optimizers(network, SGD, lr=0.0)
    sid_step(network, inputs, targets, 0.5, owners)
    before, memory = gradients(network), network.stages.hidden_weight.grad.data_ptr()
    weight = network.stages.hidden_weight
    if between == "not contiguous":
        weight.grad = torch.zeros(weight.shape[::-1]).permute(2, 1, 0)
    elif between != "nothing":
        owners[1].zero_grad(set_to_none=between == "set to None")
    sid_step(network, inputs, targets, 0.5, owners)
    assert_equal(gradients(network), before)
    if between in ("nothing", "zeroed"):
        assert weight.grad.data_ptr() == memory  # new memory would cost as much as the kernel


def test_frozen_weights_stay_and_have_no_gradient():
    for fused in (True, False):
        network, inputs, targets = make()
        network.stages.hidden_weight.requires_grad_(False)
        before = values(network)
        sid_step(network, inputs, targets, 0.5, optimizers(network, SGD, lr=0.1), fused=fused)
        changed = {name for name, value in values(network).items() if not torch.equal(value, before[name])}
        assert network.stages.hidden_weight.grad is None and changed == before.keys() - {"stages.hidden_weight"}


def test_the_state_of_modules_is_loaded():
    """Load a checkpoint of `Stage(StageHead)` modules, which this class replaced."""
    plain, inputs, _ = make(fused=False)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    network, _, _ = make()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(values(network), values(plain))
    assert torch.equal(network(inputs), plain(inputs))
    for depth in (4, 6):
        with pytest.raises(RuntimeError, match="size mismatch|Missing key|Unexpected key"):
            make(depth)[0].load_state_dict(plain.state_dict())
    assert set(make()[0].state_dict()) == {
        "extractor.weight",
        "extractor.bias",
        *(f"stages.{n}" for n in StackedHeads.SOURCES),
    }


def test_optimizers_that_do_not_fit_are_refused_before_anything_changes():
    network, inputs, targets = make()
    before = values(network)
    stale = optimizers(make()[0], SGD, lr=0.1)
    for schedule in ("one-pass", "two-phase"):
        for owners in (stale, stale[:1], [*stale, None]):
            with pytest.raises(
                ValueError, match="optimizers must be 2 over the network's own parameters, .*all stages"
            ):
                sid_step(network, inputs, targets, 0.5, owners, schedule=schedule)
    plain, _, _ = make(fused=False)
    with pytest.raises(
        ValueError, match="optimizers must be 6 over .* one for each stage, not 2 over other parameters"
    ):
        sid_step(plain, inputs, targets, 0.5, stale)
    for step in (partial(sid_step, schedule="reference"), bp_step, deep_supervision_step):
        with pytest.raises(ValueError, match="optimizers must be over the network's own parameters"):
            step(network, inputs, targets, optimizers=stale)
    assert_equal(values(network), before)


def test_what_the_cascade_holds_does_not_grow_with_depth(allocated):
    """Measure memory beyond a group of stages, which is usually all of them, and here half of them."""
    peaks = []
    for depth in (32, 64):
        network, inputs, targets = make(depth=depth, dim=16, rows=1024, hidden_dim=256)
        owners = optimizers(network, SGD, lr=0.1)

        def call(network=network, inputs=inputs, targets=targets, owners=owners):
            result = sid_step(network, inputs, targets, 0.5, owners)
            cascade_cpu.release()  # so that the next call allocates what would be kept, and it is counted
            return result

        peaks.append(allocated(call))
    assert max(peaks) <= (16 << 20) + (1 << 20) and peaks[1] <= peaks[0] + (64 << 10)


def test_the_default_network_is_stacked():
    assert isinstance(build_network("simple_cnn").stages, StackedHeads)
