"""Test what the steps of a cascade hold for backward, by depth: one stage's activations, or every stage's."""

import pytest
import torch
from torch import nn

from bench.lib.footprint import allocated_peak
from sid_trainer import bp_step, build_network, deep_supervision_step, sid_step
from sid_trainer.methods.common import STEP_SCHEDULES
from sid_trainer.training.memory import SavedBytes


def cascade_bytes(step, depth, fused=False, **options):
    """Return what the stages alone hold, run one by one: their features are given, not computed."""
    torch.manual_seed(0)
    network = build_network("simple_cnn", depth=depth, fused=fused)
    network.extractor = nn.Identity()
    options |= {"fused": False} if step is sid_step else {}
    with SavedBytes(network.parameters()) as saved:
        step(network, torch.randn(128, 128), torch.randint(0, 10, (128,)), **options)
    assert saved.alive == 0
    return saved.peak


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
def test_what_the_cascade_holds_by_depth(schedule, fused):
    few, many = (cascade_bytes(sid_step, depth, fused, schedule=schedule) for depth in (4, 32))
    if schedule == "reference":  # its one backward is over the graphs of all stages
        assert many > 6 * few
    else:
        assert 0 < many <= few


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step", [bp_step, deep_supervision_step])
def test_backpropagation_holds_every_stage(step, fused):
    few, many = (cascade_bytes(step, depth, fused) for depth in (4, 32))
    assert many > 6 * few


def test_checkpointing_and_parts_hold_less():
    """Check that checkpointing holds 10 numbers per example between stages instead of some 400, and parts their own."""
    whole = cascade_bytes(bp_step, 16)
    assert cascade_bytes(bp_step, 16, checkpointed=True) < whole / 4
    assert cascade_bytes(bp_step, 16, parts=4) == pytest.approx(whole / 4, rel=0.05)


def test_allocated_peak_of_a_known_call():
    x = torch.randn(100, 50)

    def call():
        twice = x * 2
        four = twice * 2
        del twice
        return four.sum(0), four[0]  # a view keeps all of it

    assert allocated_peak(call) == pytest.approx(2 * 100 * 50 * 4, abs=400)
