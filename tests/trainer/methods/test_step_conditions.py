"""Test `sid_step` on moved, float64, half-precision and frozen networks, a single optimizer, and unusual targets."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

from helpers.stages import gradients, values
from sid_trainer import build_network, sid_step
from sid_trainer.methods.baselines import bp_step, deep_supervision_step
from sid_trainer.methods.common import STEP_SCHEDULES


def make(layout="shared", fused=True, depth=3):
    torch.manual_seed(0)
    network = build_network(
        "mlp", layout, image_size=(4, 4), in_channels=1, depth=depth, hidden_dim=16, fused=fused
    )  # fmt: skip
    return network, torch.randn(8, 1, 4, 4), torch.randint(10, (8,))


def optimizers_of(network):
    return [SGD(module.parameters(), lr=0.1, momentum=0.9) for module in network.local_modules]


STEPS = {schedule: partial(sid_step, schedule=schedule) for schedule in STEP_SCHEDULES}
STEPS |= {"bp": bp_step, "deep-supervision": deep_supervision_step}


# ---------------------------------------------------------------- networks moved or converted between steps


def set_gradient_data(network):
    for parameter in network.parameters():
        parameter.grad.data = parameter.grad.clone()


def set_data(network):
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


MOVES = {
    "double-float": lambda network: network.double().float(),
    "share_memory": lambda network: network.share_memory(),
    "grad.data": set_gradient_data,
    "data": set_data,
    "apply": lambda network: network._apply(torch.clone),
    "to": lambda network: network.to(memory_format=torch.channels_last),
    "load_state_dict": lambda network: network.load_state_dict(network.state_dict(), assign=False),
    "no gradients": lambda network: network.zero_grad(set_to_none=True),
    "zero gradients": lambda network: network.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize("move", MOVES)
def test_a_moved_network_learns_as_one_of_separate_stages(move, schedule):
    networks = [make(fused=fused)[0] for fused in (True, False)]
    optimizers = [optimizers_of(network) for network in networks]
    if schedule == "reference":
        optimizers = [[SGD(network.parameters(), lr=0.1, momentum=0.9)] for network in networks]
    _, inputs, targets = make()
    for step in range(5):
        if step in (1, 3):
            for network in networks:
                MOVES[move](network)
        for network, own, fused in zip(networks, optimizers, (True, False), strict=True):
            sid_step(network, inputs, targets, optimizers=own, schedule=schedule, fused=fused)
        for view in (gradients, values):
            one, other = map(view, networks)
            assert one.keys() == other.keys()
            for name, expected in other.items():
                torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-6, msg=f"{name}, step {step}")


@pytest.mark.parametrize("fused", [True, False])
def test_a_double_network_learns_as_a_float_one(fused):
    float_network, inputs, targets = make(fused=fused)
    double_network = make(fused=fused)[0].double()
    for network in (float_network, double_network):
        own = optimizers_of(network)
        for _ in range(3):
            sid_step(network, inputs.to(next(network.parameters()).dtype), targets, optimizers=own)
    for name, expected in values(double_network).items():
        torch.testing.assert_close(values(float_network)[name].double(), expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- frozen stages, dtypes and optimizers


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1, 2]])
def test_frozen_stages_stay_and_the_others_learn_as_before(frozen, schedule):
    network, inputs, targets = make("stagewise")
    expected = sid_step(network, inputs, targets, schedule=schedule)
    before = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    for i in frozen:
        network.stages[i].requires_grad_(False)
    result = sid_step(network, inputs, targets, schedule=schedule)
    assert torch.equal(result.stage_loss, expected.stage_loss)
    for name, parameter in network.named_parameters():
        assert parameter.grad is None if not parameter.requires_grad else torch.equal(parameter.grad, before[name])


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize("layout", ["shared", "stagewise"])
def test_parameters_in_half_precision_are_refused(layout, schedule):
    network, inputs, targets = make(layout)
    with pytest.raises(ValueError, match=r"float32 or float64 parameters, not torch.bfloat16; for mixed"):
        sid_step(network.bfloat16(), inputs.bfloat16(), targets, schedule=schedule)


def test_one_stage_in_half_precision_is_refused():
    network, inputs, targets = make("stagewise")
    network.stages[-1].bfloat16()
    with pytest.raises(ValueError, match=r"float32 or float64 parameters, not torch.bfloat16; for mixed"):
        sid_step(network, inputs, targets)


@pytest.mark.parametrize("name", STEPS)
def test_a_single_optimizer_is_refused(name):
    network, inputs, targets = make()
    with pytest.raises(TypeError, match="optimizers must be a list of optimizers, not a single Adam"):
        STEPS[name](network, inputs, targets, optimizers=Adam(network.parameters()))


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.tensor([1] * 7 + [10]), IndexError, r"label 10 in row 7; it must be in \[0, 10\) or equal ignore_index"),
        (torch.tensor([-1] * 8), IndexError, "label -1 in row 0"),
        (torch.zeros(7, dtype=torch.long), ValueError, r"shape \(7,\); labels must have shape \(8,\)"),
        (torch.rand(8), ValueError, r"class probabilities must have the shape of logits, \(8, 10\)"),
        (torch.rand(8, 9), ValueError, r"class probabilities must have the shape of logits, \(8, 10\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, error, message, schedule):
    network, inputs, _ = make()
    with pytest.raises(error, match=message):
        sid_step(network, inputs, targets, schedule=schedule)


@pytest.mark.parametrize("ignored", [3, 8])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ignored_labels_count_the_same_in_every_schedule(ignored, dtype):
    def run(schedule):
        network, inputs, targets = make()
        targets[:ignored] = -100
        losses = sid_step(network, inputs, targets.to(dtype), schedule=schedule).stage_loss
        return gradients(network) | {"losses": losses}

    expected = run("one-pass")
    for schedule in ("two-phase", "reference"):
        for name, value in run(schedule).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert bool(expected["losses"].any()) == (ignored < 8)
