"""Equal stages in one memory: the same numbers as stage by stage, and to a user still one module a stage."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from sid_kernels.cascade import cpu as cascade_cpu
from sid_trainer import SIDNetwork, Stage, StageHead, build_network, sid_step, stacked_stages
from sid_trainer.methods.baselines import bp_step, deep_supervision_step

ROUNDING = 2e-5  # of a parameter's largest gradient: float32 sums of a few thousand terms in another order


def make(depth=5, dim=16, classes=10, rows=24, plain=False, width=32):
    torch.manual_seed(0)
    stages = [Stage(StageHead(dim, classes, width)) for _ in range(depth)]
    network = SIDNetwork(nn.Linear(12, dim), stages, classes)
    if plain:  # a hook wants to see the stages called, so they are
        network.stages[0].register_forward_hook(lambda *_: None)
    return network, torch.randn(rows, 12), torch.randint(0, classes, (rows,))


def values(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def gradients(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def optimizers(network, kind=SGD, at_once=False, **options):
    stages = [stacked_stages(network)] if at_once else network.stages
    return [kind(x.parameters(), **options) for x in (network.extractor, *stages)]


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("alpha", [0.5, [0.9, 0.7, 0.5, 0.3, 0.1], torch.tensor(0.3)], ids=str)
def test_gradients_and_losses_are_those_of_stage_by_stage(classes, alpha):
    results = []
    for plain in (False, True):
        network, inputs, targets = make(classes=classes, plain=plain)
        assert (stacked_stages(network) is None) == plain
        results.append((sid_step(network, inputs, targets, alpha), gradients(network)))
    (result, found), (expected, wanted) = results
    torch.testing.assert_close(result.stage_loss, expected.stage_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= ROUNDING * value.abs().max(), name


def test_soft_targets_and_gradients_that_add_up():
    network, inputs, _ = make()
    plain, _, _ = make(plain=True)
    targets = torch.rand(24, 10).softmax(-1)
    for _ in range(2):
        sid_step(network, inputs, targets)
        sid_step(plain, inputs, targets)
    for name, value in gradients(plain).items():
        assert (gradients(network)[name] - value).abs().max() <= ROUNDING * value.abs().max(), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"lr": 1e-2}),
        (Adam, {"lr": 1e-2, "fused": True}),
        (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    ],
)
def test_one_update_of_all_stages_is_an_update_of_each(kind, options):
    ends = []
    for at_once in (False, True):
        network, inputs, targets = make()
        owners = optimizers(network, kind, at_once, **options)
        for _ in range(4):
            sid_step(network, inputs, targets, 0.5, owners)
        ends.append(values(network))
        assert stacked_stages(network) is not None
    for name, value in ends[0].items():
        if options.get("fused"):  # its vectors and their rest round differently, and end at other elements
            torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, ends[1][name]), name


def test_equal_bits_run_to_run():
    ends = []
    for _ in range(2):
        network, inputs, targets = make(rows=100)
        owners = optimizers(network, Adam, True, lr=1e-2, fused=True)
        for _ in range(3):
            result = sid_step(network, inputs, targets, 0.5, owners)
        ends.append(values(network) | {"losses": result.stage_loss})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_stage_is_read_changed_saved_and_loaded_by_itself():
    network, inputs, targets = make()
    before = values(network)
    stacked = stacked_stages(network)
    assert all(torch.equal(value, before[name]) for name, value in values(network).items())
    assert list(network.state_dict()) == list(before)
    # changed through the stage, seen in the stack, and the other way round
    with torch.no_grad():
        network.stages[2].head.logits.bias.fill_(3.0)
        stacked.weights.hidden_bias[1].fill_(4.0)
    assert (stacked.weights.logits_bias[2] == 3.0).all() and (network.stages[1].head.hidden.bias == 4.0).all()
    # one stage's file holds that stage alone
    file, whole = io.BytesIO(), io.BytesIO()
    torch.save(network.stages[0].state_dict(), file)
    torch.save(network.state_dict(), whole)
    assert file.tell() < 4 * sum(p.numel() for p in network.stages[0].parameters()) + 3000
    other, _, _ = make()
    stacked_stages(other)
    whole.seek(0)
    other.load_state_dict(torch.load(whole, weights_only=True))
    assert torch.equal(stacked_stages(other).weights.logits_bias, stacked.weights.logits_bias)
    # swapped in by assignment: the stack takes it in at the next step
    file.seek(0)
    network.stages[1].load_state_dict(torch.load(file, weights_only=True), assign=True)
    again = stacked_stages(network)
    assert torch.equal(again.weights.hidden_weight[1], network.stages[0].head.hidden.weight)
    sid_step(network, inputs, targets)


def test_copies_and_moves_are_stacked_anew():
    network, inputs, targets = make()
    stacked = stacked_stages(network)
    twin = copy.deepcopy(network)
    assert stacked_stages(twin) is not stacked
    with torch.no_grad():
        twin.stages[0].head.logits.bias.fill_(9.0)
    assert not (network.stages[0].head.logits.bias == 9.0).any()
    network.double()
    assert stacked_stages(network) is None
    network.float()
    assert (again := stacked_stages(network)) is not None
    assert torch.equal(again.weights.logits_weight[1], network.stages[1].head.logits.weight)
    # moved away and back by reference: the optimizer's stacked parameters take the values in
    owners = optimizers(network, SGD, True, lr=0.1)
    for parameter in network.stages.parameters():
        parameter.data = parameter.data.clone()
    before = values(network)
    sid_step(network, inputs, targets, 0.5, owners)
    assert stacked_stages(network) is again
    assert all(not torch.equal(value, before[name]) for name, value in values(network).items())


def test_which_networks_do_not_qualify():
    def check(change):
        network, inputs, targets = make()
        change(network)
        assert stacked_stages(network) is None
        assert sid_step(network, inputs, targets).stage_loss.isfinite().all()

    def wider(network):
        network.stages[1] = Stage(StageHead(16, 10, 40))

    def frozen(network):
        network.stages[1].head.hidden.bias.requires_grad_(False)

    def other_head(network):
        class Mine(StageHead):
            pass

        network.stages[0] = Stage(Mine(16, 10))

    def body(network):
        network.stages[0] = Stage(StageHead(16, 10, 32), nn.ReLU())

    def deeper(network):
        network.stages[0] = Stage(StageHead(16, 10, 32, depth=2))

    def linear(network):
        network.stages[0] = Stage(StageHead(16, 10, depth=0))

    def pooling(network):
        network.stages[0] = Stage(StageHead(16, 10, 32, pooling=nn.Tanh()))

    def without_bias(network):
        network.stages[2].head.logits = nn.Linear(32, 10, bias=False)

    def twice(network):
        network.stages[1] = network.stages[0]

    def own_forward(network):
        head = network.stages[0].head
        head.forward = lambda features, prior, old=head.forward: old(features, prior)

    def gradient_hook(network):
        network.stages[0].head.hidden.weight.register_post_accumulate_grad_hook(lambda p: None)

    heads, parameters = (other_head, deeper, linear, pooling, own_forward), (wider, frozen, without_bias, twice)
    for change in (*heads, *parameters, body, gradient_hook):
        check(change)


def test_optimizers_that_do_not_fit_are_refused_before_anything_changes():
    network, inputs, targets = make()
    owners = optimizers(network, SGD, True, lr=0.1)
    before = values(network)
    network.stages[0].register_forward_hook(lambda *_: None)  # now it goes stage by stage
    with pytest.raises(ValueError, match="one a stage, 6, each over its own parameters"):
        sid_step(network, inputs, targets, 0.5, owners)
    with pytest.raises(ValueError, match="one a stage, 6"):
        sid_step(network, inputs, targets, 0.5, owners, schedule="two-phase")
    for step in (partial(sid_step, schedule="reference"), bp_step, deep_supervision_step):
        with pytest.raises(ValueError, match="those of stacked_stages.* are for sid_step one-pass"):
            step(network, inputs, targets, optimizers=owners)
    assert all(torch.equal(value, before[name]) for name, value in values(network).items())


def test_what_the_cascade_holds_does_not_grow_with_depth(allocated):
    """Beyond its group of stages, which is all of them at usual sizes: here small enough that it is two."""
    peaks = []
    for depth in (32, 64):
        network, inputs, targets = make(depth=depth, dim=16, rows=1024, width=256)
        owners = optimizers(network, SGD, True, lr=0.1)

        def call(network=network, inputs=inputs, targets=targets, owners=owners):
            result = sid_step(network, inputs, targets, 0.5, owners)
            cascade_cpu.release()  # so that the next call takes anew, and is charged with, what would be kept
            return result

        peaks.append(allocated(call))
    assert max(peaks) <= (16 << 20) + (1 << 20) and peaks[1] <= peaks[0] + (64 << 10)


def test_shared_memory_new_parameters_and_inference_mode():
    network, inputs, targets = make()
    owners = optimizers(network, SGD, True, lr=0.1)

    def moves():
        before = values(network)
        sid_step(network, inputs, targets, 0.5, owners)
        return all(not torch.equal(value, before[name]) for name, value in values(network).items())

    assert moves()
    network.share_memory()  # moves every parameter's memory away under it
    assert moves()
    plain, _, _ = make(plain=True)
    network.load_state_dict(network.state_dict(), assign=True)  # other parameters, where the old ones were
    for parameter in network.parameters():
        parameter.requires_grad_()
    plain.load_state_dict(network.state_dict())
    sid_step(network, inputs, targets)
    sid_step(plain, inputs, targets)
    for name, value in gradients(plain).items():
        assert (gradients(network)[name] - value).abs().max() <= ROUNDING * value.abs().max(), name
    fresh, _, _ = make()
    with torch.inference_mode():
        stacked_stages(fresh)
    fresh(inputs).sum().backward()


def test_the_trainers_network_qualifies():
    assert stacked_stages(build_network("simple_cnn")) is not None
