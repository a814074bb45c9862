"""Test the SID step in its schedules: gradients and updates against a reference written here.

test_methods.py runs all methods and networks.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

from helpers.stages import gradients
from sid_trainer import bp_step, build_network, deep_supervision_step, sid_step
from sid_trainer.methods.common import STEP_SCHEDULES
from sid_trainer.network.architectures import LAYOUTS
from sid_trainer.network.loss_options import StageLossOptions

ROUNDING = 2e-5  # of a parameter's largest gradient: float32 sums of a few thousand terms in another order


def make(depth=10, in_channels=3, size=16, batch=16, fused=True):
    torch.manual_seed(0)
    network = build_network("simple_cnn", num_classes=10, in_channels=in_channels, depth=depth, fused=fused)
    return network, torch.randn(batch, in_channels, size, size), torch.randint(0, 10, (batch,))


def summed_loss_gradients(network, inputs, targets, alphas):
    """Compute gradients by one backward over the sum of all stages' losses, teachers detached; stages are modules."""
    network.zero_grad()
    features = network.extractor(inputs)
    prior, total = torch.full((len(inputs), 10), 0.1), 0
    for stage, alpha in zip(network.stages, alphas, strict=True):
        hidden, output = (layer for layer in stage.modules() if isinstance(layer, nn.Linear))
        logits = output(F.relu(hidden(torch.cat((prior, features), dim=1))))
        consistency = F.kl_div(F.log_softmax(logits, 1), prior, reduction="batchmean")
        total = total + alpha * F.cross_entropy(logits, targets) + (1 - alpha) * consistency
        prior = logits.softmax(1).detach()
    total.backward()
    actual = gradients(network)
    network.zero_grad()
    return actual


def assert_within_rounding(actual, expected, rounding=ROUNDING):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error <= rounding, f"{name}: off by {error:.1e} of the largest"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize(("in_channels", "size"), [(3, 32), (1, 8), (1, 28)])
def test_gradients_are_those_of_the_summed_loss(schedule, in_channels, size, fused):
    network, inputs, targets = make(in_channels=in_channels, size=size, fused=False)
    expected = summed_loss_gradients(network, inputs, targets, [0.5] * 10)
    if fused:
        network, inputs, targets = make(in_channels=in_channels, size=size)
    sid_step(network, inputs, targets, 0.5, schedule=schedule)
    assert_within_rounding(gradients(network), expected)
    sid_step(network, inputs, targets, 0.5, schedule=schedule)  # gradients add up, as with backward
    assert_within_rounding(gradients(network), {name: 2 * value for name, value in expected.items()})


def test_the_schedule_reference_and_alpha_by_stage():
    alphas = [0.9 - 0.05 * i for i in range(10)]
    expected = summed_loss_gradients(*make(fused=False), alphas)
    network, inputs, targets = make()
    one = sid_step(network, inputs, targets, alphas)
    assert_within_rounding(gradients(network), expected)
    network.zero_grad()
    other = sid_step(network, inputs, targets, alphas, schedule="reference")
    assert_within_rounding(gradients(network), expected)
    assert one.stage_loss.shape == (10,)
    torch.testing.assert_close(one.stage_loss, other.stage_loss)


def test_soft_targets():
    network, inputs, targets = make()
    soft = 0.8 * F.one_hot(targets, 10) + 0.02
    sid_step(network, inputs, soft)
    one = gradients(network)
    network.zero_grad()
    sid_step(network, inputs, soft, schedule="reference")
    assert_within_rounding(one, gradients(network))


@pytest.mark.parametrize("channels_last", [False, True])
def test_updates_are_those_of_the_reference(channels_last):
    """Compare in float64, where the parameters' changes in three steps can be told from rounding."""
    results = []
    for schedule in STEP_SCHEDULES:
        network, inputs, targets = make()
        network, inputs = network.double(), inputs.double()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        modules = network.local_modules
        optimizers = [SGD(module.parameters(), lr=0.05, momentum=0.9) for module in modules]
        start = [parameter.clone() for parameter in network.parameters()]
        for _ in range(3):
            sid_step(network, inputs, targets, 0.5, optimizers, schedule=schedule)
        moves = [parameter - before for parameter, before in zip(network.parameters(), start, strict=True)]
        results.append({str(i): move.detach() for i, move in enumerate(moves)})
    for other in results[1:]:
        assert_within_rounding(other, results[0], rounding=1e-9)


def test_fused_adam_on_channels_last_weights_is_adam():
    results = []
    for fused in (False, True):
        network, inputs, targets = make()
        network = network.to(memory_format=torch.channels_last)
        modules = network.local_modules
        optimizers = [Adam(module.parameters(), lr=1e-3, fused=fused) for module in modules]
        for _ in range(2):
            sid_step(network, inputs, targets, 0.5, optimizers)
        results.append([parameter.detach() for parameter in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_a_similar_gradient():
    network, inputs, targets = make(batch=64)
    sid_step(network, inputs, targets)
    full = gradients(network)
    network.zero_grad()
    result = sid_step(network, inputs, targets, dtype=torch.bfloat16)
    assert result.stage_loss.dtype == torch.float32
    for name, value in gradients(network).items():
        assert value.dtype == torch.float32
        assert F.cosine_similarity(value.flatten(), full[name].flatten(), dim=0) > 0.98, name


def test_wrong_arguments_are_named():
    network, inputs, targets = make(depth=2, batch=2)
    with pytest.raises(
        ValueError, match="step schedule must be one of one-pass, two-phase, reference, not 'three-phase'"
    ):
        sid_step(network, inputs, targets, schedule="three-phase")
    with pytest.raises(ValueError, match="one for each of the 2 stages, not 3"):
        sid_step(network, inputs, targets, [0.5] * 3)
    with pytest.raises(
        ValueError, match="optimizers must be 2 .*, one for the extractor and one for all stages, not 1"
    ):
        sid_step(network, inputs, targets, 0.5, [SGD(network.parameters(), lr=1)])


def test_the_reference_network():
    network = build_network("simple_cnn", layout="shared", num_classes=10, in_channels=3, depth=2, fused=False)
    convolutions = [(32, 3, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 64, 3, 3), (128,), (128, 128, 3, 3), (128,)]
    stage = [(256, 138), (256,), (10, 256), (10,)]
    assert [tuple(p.shape) for p in network.parameters()] == [*convolutions, (128, 128), (128,), *stage, *stage]


def test_pooling_before_relu_changes_no_bit():
    """Compare with the reference's order, ReLU before each pooling, on values that tie at zero."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    actual = []
    for order in ((nn.ReLU(), nn.MaxPool2d(2)), (nn.MaxPool2d(2), nn.ReLU())):
        inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round().requires_grad_()
        conv.zero_grad()
        output = nn.Sequential(conv, *order)(inputs)
        output.square().sum().backward()
        actual.append((output, inputs.grad, conv.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


@pytest.mark.parametrize("step", [sid_step, bp_step, deep_supervision_step])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_callers_autocast_is_used(step, layout):
    """Check that a step under autocast has the results of one that is told the dtype, not those of float32."""

    def run(context, **options):
        torch.manual_seed(0)
        network = build_network("simple_cnn", layout, in_channels=1, image_size=(8, 8), depth=4)
        with context:
            result = step(network, inputs, targets, **options)
        return [*result, *(parameter.grad for parameter in network.parameters())]

    inputs, targets = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    under = run(torch.autocast("cpu", torch.bfloat16))
    told, float32 = run(nullcontext(), dtype=torch.bfloat16), run(nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(under, told, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(under, float32, strict=True))


def test_a_wrapped_network_is_refused_and_several_processes_are_warned(monkeypatch):
    network, inputs, targets = make(depth=2)
    with pytest.raises(TypeError, match="network must be a SIDNetwork, not DataParallel; networks that are wrapped"):
        sid_step(nn.DataParallel(network), inputs, targets)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="sid_step does not reduce gradients over the 2 processes"):
        sid_step(network, inputs, targets)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
def test_labels_out_of_range_and_ignored_ones_in_every_schedule(schedule, fused):
    network, inputs, targets = make(depth=2, fused=fused)
    targets[3] = 10
    with pytest.raises(
        IndexError, match=r"target has label 10 in row 3; it must be in \[0, 10\) or equal ignore_index"
    ):
        sid_step(network, inputs, targets, schedule=schedule)
    targets[3] = -100
    network.zero_grad()
    actual = sid_step(network, inputs, targets, 1.0, schedule=schedule).stage_loss[0]
    first = make(depth=2, fused=False)[0]
    with torch.no_grad():
        _, logits = next(iter(first.stages))(first.extractor(inputs), torch.full((16, 10), 0.1))
    torch.testing.assert_close(actual, F.cross_entropy(logits, targets))


@pytest.mark.parametrize("way", [*STEP_SCHEDULES, "loop"])
def test_label_smoothing_by_stage(way):
    smoothing, alphas = [0.5, 0.25, 0.0], [0.5, 0.7, 0.9]
    network, inputs, targets = make(depth=3, fused=False)
    network.zero_grad()
    features, prior, total = network.extractor(inputs), torch.full((16, 10), 0.1), 0
    for stage, alpha, share in zip(network.stages, alphas, smoothing, strict=True):
        logits = stage(features, prior)[1]
        consistency = F.kl_div(F.log_softmax(logits, 1), prior, reduction="batchmean")
        fidelity = F.cross_entropy(logits, targets, label_smoothing=share)
        # cross-entropy is fidelity up to a constant: the entropy of a smoothed label does not depend on the stage
        total, prior = total + alpha * fidelity + (1 - alpha) * consistency, logits.softmax(1).detach()
    total.backward()
    expected = gradients(network)
    network.zero_grad()
    if way == "loop":
        network.loss_options = StageLossOptions(alphas, label_smoothing=smoothing)
        network(inputs, targets).loss.backward()
    else:
        sid_step(network, inputs, targets, alphas, schedule=way, label_smoothing=smoothing)
    assert_within_rounding(gradients(network), expected)


def test_label_smoothing_by_stage_fits_the_stages():
    stacked, inputs, targets = make(depth=3)
    options = {"alpha": [0.5] * 3, "label_smoothing": [0.5, 0.25, 0.0]}
    separate = make(depth=3, fused=False)[0]
    for network in (stacked, separate):  # stages that share a kernel have one smoothing; these run one by one
        sid_step(network, inputs, targets, **options)
    assert torch.equal(stacked.stages.logits_bias.grad[1], separate.stages[1].head.logits.bias.grad)
    stacked.loss_options = StageLossOptions(**options)
    with pytest.raises(ValueError, match="label_smoothing must be one number for StackedHeads"):
        stacked(inputs, targets)
    with pytest.raises(ValueError, match="label_smoothing must be one number or one for each of the 3 stages, not 2"):
        sid_step(stacked, inputs, targets, label_smoothing=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], not 2"):
        sid_step(stacked, inputs, targets, label_smoothing=[0.1, 0.2, 2])
