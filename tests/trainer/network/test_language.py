"""Language models: causality, positions, readouts, and stages that learn from losses of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sid_trainer import bp_step, sid_step
from sid_trainer.methods import readouts
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import METHODS, make_optimizers, make_step
from sid_trainer.network.language import SharedReadout, build_language_model
from sid_trainer.training.evaluation import evaluate

V, T = 11, 8


def model(stages=2, **options):
    torch.manual_seed(0)
    return build_language_model(V, T, stages, **{"layers": 4, "width": 16, "attention_heads": 2} | options)


def tokens(batch=3):
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(V, (batch, T + 1), generator=generator)
    return windows[:, :-1], windows[:, 1:].flatten()


def test_a_prediction_reads_the_tokens_before_it_and_no_other():
    network, (inputs, _) = model(), tokens()
    logits = network(inputs)
    assert logits.shape == (3, T, V)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    difference = (network(changed) - logits).abs().amax((0, 2))
    assert not difference[:5].any() and difference[5:].all()


def test_positions_are_relative():
    """The same tokens later in the window, all that is before them equal to nothing, give the same attention."""
    rotary = model().stages[0].body[1].rotary
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for shift in (0, 3):
        rows = torch.zeros(2, 1, 1, T, 8)
        rows[0, :, :, shift + 2], rows[1, :, :, shift] = query, key
        turned = [rotary(row) for row in rows]
        scores.append((turned[0][..., shift + 2, :] * turned[1][..., shift, :]).sum())
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    network, (inputs, targets) = model(plain=method.startswith("bp"), readout_blocks=1), tokens()
    optimizers = make_optimizers(network, method, lr=1e-2)
    step = make_step(method, network, optimizers)
    losses = [step(inputs, targets).stage_loss[-1].item() for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


def test_losses_and_gradients_are_those_of_plain_pytorch():
    network, (inputs, targets) = model(3), tokens()
    alpha = [0.9, 0.7, 0.6]
    result = sid_step(network, inputs, targets, alpha)
    gradients = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    features, prior, total = inputs, torch.full((3 * T, V), 1 / V), 0.0
    for i, stage in enumerate(network.stages):
        features, logits = stage(features, prior)
        consistency = F.kl_div(logits.log_softmax(1), prior, reduction="batchmean")
        loss = alpha[i] * F.cross_entropy(logits, targets) + (1 - alpha[i]) * consistency
        torch.testing.assert_close(result.stage_loss[i], loss.detach())
        total, features, prior = total + loss, features.detach(), logits.detach().softmax(1)
    total.backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_call_with_targets_gives_the_gradients_of_sid_step():
    network, (inputs, targets) = model(), tokens()
    sid_step(network, inputs, targets, 0.5)
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network(inputs, targets.view(3, T)).loss.backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_plain_model_is_one_stage():
    network, (inputs, targets) = model(plain=True), tokens()
    result = bp_step(network, inputs, targets)
    torch.testing.assert_close(result.stage_loss[0], F.cross_entropy(network(inputs).flatten(0, 1), targets).detach())
    assert network.depth == 1


def test_parts_of_a_batch_have_the_targets_of_their_windows():
    network, (inputs, targets) = model(plain=True), tokens(7)
    whole = bp_step(network, inputs, targets)
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    parts = bp_step(network, inputs, targets, parts=3)  # of 3, 2 and 2 windows
    torch.testing.assert_close(parts, whole)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# ---------------------------------------------------------------- shared readouts


def test_a_shared_readout_has_the_weight_of_the_step_before():
    network, (inputs, targets) = model(3, readout="shared"), tokens()
    last = network.stages[-1].head.logits
    assert [type(stage.head) for stage in network.stages[:2]] == [SharedReadout] * 2
    assert all(last.weight is not p for stage in network.stages[:2] for p in stage.parameters())
    step = make_step("sid", network, make_optimizers(network, lr=1e-2))
    for _ in range(3):
        before = last.weight.detach().clone()
        step(inputs, targets)
        assert not torch.equal(before, last.weight)
        assert all(torch.equal(stage.head.weight, before) for stage in network.stages[:2])


def test_a_shared_readout_is_refreshed_every_so_many_steps():
    network, (inputs, targets) = model(readout="shared", readout_refresh=3), tokens()
    step, weights = make_step("sid", network, make_optimizers(network, lr=1e-2)), []
    for _ in range(7):
        weights.append(network.stages[-1].head.logits.weight.detach().clone())
        step(inputs, targets)
        assert torch.equal(network.stages[0].head.weight, weights[(len(weights) - 1) // 3 * 3])
    network.eval()(inputs)
    assert network.stages[0].head.calls == 7  # inference counts for nothing


def test_no_gradient_of_a_shared_readout_reaches_the_last_stage():
    network, (inputs, targets) = model(readout="shared"), tokens()
    other = copy.deepcopy(network)
    assert other.stages[0].head.source[0] is other.stages[1].head.logits
    with torch.no_grad():
        other.stages[0].head.scale.mul_(3.0)
    for one in (network, other):
        sid_step(one, inputs, targets, 1.0)  # without the preceding belief
    for a, b in zip(network.stages[1].parameters(), other.stages[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not torch.equal(network.stages[0].head.scale.grad, other.stages[0].head.scale.grad)


# ---------------------------------------------------------------- generation


def test_the_next_token_is_that_of_a_whole_call_or_of_the_first_stage_that_is_sure():
    network, (inputs, _) = model(3).eval(), tokens(1)
    logits, stages = network.next_token(inputs, 2.0)
    assert stages == 3
    torch.testing.assert_close(logits, network(inputs)[0, -1])
    assert network.next_token(inputs, 0.0)[1] == 1


def test_predict_is_for_images():
    with pytest.raises(ValueError, match="predict is for images, not for tokens; call next_token"):
        model().predict(tokens()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 5}, "depth must be at most the number of layers, 4, for gpt, not 5"),
        ({"width": 18}, "width must be a multiple of twice attention_heads, 4, not 18"),
        ({"readout": "tied"}, "readout must be one of private, shared, not 'tied'"),
        ({"attention_heads": 0}, "attention_heads must be at least 1, not 0"),
        ({"readout_refresh": 0}, "readout_refresh must be at least 1, not 0"),
        ({"readout_blocks": -1}, "readout_blocks must be at least 0, not -1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match=f"inputs must have at most {T} tokens, the context, not {T + 1}"):
        model()(torch.zeros(1, T + 1, dtype=torch.int64))


def test_blocks_before_a_readout_are_its_own():
    network = model(2, readout_blocks=2)
    assert [len(stage.head.blocks) for stage in network.stages] == [2, 0]
    assert sum(isinstance(module, nn.Embedding) for module in network.modules()) == 1


# ---------------------------------------------------------------- losses without all logits


@pytest.mark.parametrize("readout", ["private", "shared"])
def test_a_step_in_chunks_trains_as_one_with_all_logits(readout, monkeypatch):
    inputs, targets = tokens()
    targets[2] = -100  # padding
    weights, losses = [], []
    for most in (readouts.MOST_BYTES, 100):
        monkeypatch.setattr(readouts, "MOST_BYTES", most)
        network = model(3, readout=readout, readout_blocks=1)
        step = make_step("sid", network, make_optimizers(network, lr=1e-2, optimizer="sgd"))
        results = [step(inputs, targets) for _ in range(3)]
        assert len(results[0].logits) == (3 * T if most > 100 else 0)
        losses.append(torch.stack([result.stage_loss for result in results]))
        right = [result.correct(targets) for result in results]
        weights.append([*network.parameters(), torch.stack(right).float()])
    torch.testing.assert_close(*losses)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "frozen"])
def test_a_step_in_chunks_trains_an_extractor_and_skips_a_frozen_stage(case, monkeypatch):
    weights = []
    for most in (readouts.MOST_BYTES, 100):
        monkeypatch.setattr(readouts, "MOST_BYTES", most)
        network = model(3)
        network.stages[0].requires_grad_(case == "plain")
        network = network.plain() if case == "plain" else network
        step = make_step("sid", network, make_optimizers(network, lr=1e-2, optimizer="sgd"))
        result = step(*tokens())
        assert len(result.logits) == (3 * T if most > 100 else 0)
        weights.append([*network.parameters()])
    for one, other, drawn in zip(*weights, network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert drawn.requires_grad == (drawn.grad is not None)


def test_an_evaluation_in_parts_measures_the_same(monkeypatch):
    network, batch = model(3), tokens(7)
    whole = evaluate(network, [batch], StepOptions(0.7))
    monkeypatch.setattr(readouts, "MOST_BYTES", 2 * T * V * 4)
    sizes = [(len(inputs), len(targets)) for inputs, targets in readouts.in_parts(network, [batch])]
    assert sizes == [(2, 2 * T)] * 3 + [(1, T)]
    parts = evaluate(network, [batch], StepOptions(0.7))
    assert all(parts[name] == pytest.approx(whole[name]) for name in whole)


def test_a_large_step_holds_no_logits_of_all_tokens(allocated):
    rows, classes = 2048, 16384  # 128 MiB of logits
    torch.manual_seed(0)
    network = build_language_model(classes, 256, 2, layers=2, width=16, attention_heads=2)
    inputs, targets = torch.randint(classes, (8, 256)), torch.randint(classes, (rows,))
    step = make_step("sid", network, make_optimizers(network))
    step(inputs, targets)
    assert allocated(lambda: step(inputs, targets)) < 0.8 * rows * classes * 4
    unfused = make_step("sid", network, make_optimizers(network), StepOptions(fused=False))
    assert allocated(lambda: unfused(inputs, targets)) > 2 * rows * classes * 4
