"""Test a call with targets: it has `sid_step`'s gradients, fits any loop, and holds one stage's memory."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sid_trainer import (
    SIDNetwork,
    StackedHeads,
    Stage,
    StageHead,
    StageLossOptions,
    add_stage_loss,
    build_network,
    cut,
    sid_step,
)
from sid_trainer.network.architectures import TRUNKS

SIZE = (8, 8)


def batch(count=6, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, *SIZE, generator=generator)
    return inputs, torch.randint(classes, (count,), generator=generator)


def small_network(**settings):
    torch.manual_seed(0)
    return build_network("mlp", "stagewise", image_size=SIZE, **settings)


def gradients(network):
    return [parameter.grad for parameter in network.parameters()]


def assert_equal_gradients(network, other, **tolerance):
    for own, its in zip(gradients(network), gradients(other), strict=True):
        assert own is not None and its is not None
        torch.testing.assert_close(own, its, **(tolerance or {"rtol": 0, "atol": 0}))


def is_short(arch, layout, dtype):
    """Return whether a case runs by default: small networks in every layout and dtype, others stagewise, float32."""
    return arch in ("mlp", "simple_cnn") or (layout[0] == "stagewise" and dtype is torch.float32)


LAYOUTS = [("shared", True), ("shared", False), ("stagewise", True)]
CASES = [
    pytest.param(arch, *layout, dtype, marks=[] if is_short(arch, layout, dtype) else [pytest.mark.slow])
    for arch in TRUNKS
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("arch", "layout", "fused", "dtype"), CASES)
def test_gradients_are_those_of_the_step(arch, layout, fused, dtype):
    torch.manual_seed(0)
    network = build_network(arch, layout, image_size=SIZE, fused=fused, depth=3 if layout == "shared" else None)
    other, (inputs, targets) = copy.deepcopy(network), batch()
    result = sid_step(network, inputs, targets, dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = other(inputs, targets)
    assert gradients(other) == [None] * len(gradients(other))
    output.loss.backward()
    assert torch.equal(output.stage_loss, result.stage_loss) and torch.equal(output.logits, result.logits)
    assert torch.equal(output.loss.detach(), result.stage_loss.sum())
    assert_equal_gradients(other, network)


@pytest.mark.parametrize("layout", ["shared", "stagewise"])
def test_soft_targets_and_options_are_those_of_the_step(layout):
    torch.manual_seed(0)
    network = build_network("mlp", layout, image_size=SIZE, depth=3)
    other, (inputs, _) = copy.deepcopy(network), batch()
    targets = torch.rand(6, 10).softmax(1)
    other.loss_options = StageLossOptions([0.2, 0.5, 0.9], "reverse", 0.1)
    sid_step(network, inputs, targets, [0.2, 0.5, 0.9], divergence="reverse", label_smoothing=0.1)
    other(inputs, targets).loss.backward()
    assert_equal_gradients(other, network)


def test_without_targets_it_returns_logits_and_without_gradients_the_losses_only():
    network, (inputs, targets) = small_network(), batch()
    assert torch.equal(network(inputs), network.stage_logits(inputs)[-1])
    with torch.no_grad():
        output = network(inputs, targets)
    assert not output.loss.requires_grad
    assert torch.equal(output.stage_loss, network(inputs, targets).stage_loss)


def test_accumulation_over_parts_of_a_batch_gives_the_gradient_of_the_whole():
    network, (inputs, targets) = small_network(), batch(8)
    other = copy.deepcopy(network)
    network(inputs, targets).loss.backward()
    for part in range(4):
        (other(inputs[2 * part :][:2], targets[2 * part :][:2]).loss / 4).backward()
    assert_equal_gradients(other, network, rtol=1e-4, atol=1e-6)


def test_the_factor_of_the_loss_multiplies_every_gradient_and_adds_to_what_is_there():
    network, (inputs, targets) = small_network(), batch()
    other = copy.deepcopy(network)
    network(inputs, targets).loss.backward()
    for _ in range(2):
        (other(inputs, targets).loss * 0.5).backward()
    assert_equal_gradients(other, network)


def test_parameters_that_share_a_gradient_are_scaled_once():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

        def forward(self, inputs):
            return inputs + (self.first + self.second)

    torch.manual_seed(0)
    network = cut(nn.Sequential(Sum(), nn.Linear(4, 4)), ["0", "1"], 3, torch.randn(2, 4))
    (network(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])).loss * 2).backward()
    first, second = network.model[0].first, network.model[0].second
    assert torch.equal(first.grad, second.grad) and first.grad.abs().sum() > 0
    assert first.grad.data_ptr() != second.grad.data_ptr()


@pytest.mark.parametrize("kind", ["stages", "names"])
def test_hooks_of_parameters_run_once_on_what_they_get(kind):
    networks, (inputs, targets) = [deep_network(kind, 2) for _ in range(2)], batch()
    networks[1].load_state_dict(networks[0].state_dict())
    seen = []
    for parameter in networks[0].parameters():
        parameter.register_hook(lambda gradient: gradient * 0.5)
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    for factor in (1.0, 3.0):
        for network in networks:
            network.zero_grad()
            (network(inputs, targets).loss * factor).backward()
        for own, its in zip(gradients(networks[0]), gradients(networks[1]), strict=True):
            torch.testing.assert_close(own, its * 0.5)
    assert len(seen) == 2 * len(gradients(networks[0]))


@pytest.mark.parametrize("kind", ["stages", "names"])
def test_inputs_that_require_a_gradient_are_warned_of(kind):
    network, (inputs, targets) = deep_network(kind, 2), batch()
    with pytest.warns(UserWarning, match="inputs that require a gradient get none from a call with targets") as caught:
        network(inputs.requires_grad_(), targets)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(inputs)
        with torch.no_grad():
            network(inputs, targets)


def test_a_second_backward_is_an_error_that_says_what_to_do():
    network, (inputs, targets) = small_network(), batch()
    loss = network(inputs, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the network again"):
        loss.backward()


def test_frozen_parameters_and_stages_have_no_gradient_and_change_no_other():
    network, (inputs, targets) = small_network(), batch()
    other = copy.deepcopy(network)
    network(inputs, targets).loss.backward()
    for parameter in (*other.stages[1].parameters(), *other.stages[2].body.parameters()):
        parameter.requires_grad_(False)
    other(inputs, targets).loss.backward()
    for own, full in zip(other.parameters(), network.parameters(), strict=True):
        assert (own.grad is None) == (not own.requires_grad)
        assert own.grad is None or torch.equal(own.grad, full.grad)


def test_a_wholly_frozen_network_gives_losses_without_gradients():
    network, (inputs, targets) = small_network().requires_grad_(False), batch()
    output = network(inputs, targets)
    assert not output.loss.requires_grad and output.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_trunks_of_other_dtypes_train(dtype):
    network, (inputs, targets) = small_network().to(dtype), batch()
    inputs = inputs.to(dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        output = network(inputs, targets)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad.dtype is dtype for parameter in network.parameters())


def test_an_own_term_is_part_of_its_stage_and_of_no_other():
    class Penalised(nn.Linear):
        def forward(self, inputs):
            add_stage_loss(self.weight.square().sum())
            return super().forward(inputs)

    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 4), Penalised(4, 4))
    network, inputs, targets = cut(trunk, [1], 3, torch.randn(2, 4)), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    output = network(inputs, targets)
    output.loss.backward()
    with_term = trunk[1].weight.grad.clone()
    first = trunk[0].weight.grad.clone()
    network.zero_grad()
    trunk[1].forward = lambda x: nn.functional.linear(x, trunk[1].weight, trunk[1].bias)
    plain = network(inputs, targets)
    plain.loss.backward()
    torch.testing.assert_close(with_term - trunk[1].weight.grad, 2 * trunk[1].weight.detach())
    assert torch.equal(first, trunk[0].weight.grad)
    torch.testing.assert_close(
        output.stage_loss - plain.stage_loss, torch.tensor([0.0, trunk[1].weight.square().sum().item()])
    )


class Weighed(nn.Linear):
    """A linear layer that adds a term to its stage's loss."""

    def forward(self, inputs):
        add_stage_loss(self.weight.square().sum())
        return super().forward(inputs)


def weighed(where):
    torch.manual_seed(0)
    if where == "stages":
        return cut(nn.Sequential(nn.Linear(4, 4), Weighed(4, 4)), [1], 3, torch.randn(2, 4))
    heads = StackedHeads(2, 4, 3) if where == "extractor, stacked" else [Stage(StageHead(4, 3)) for _ in range(2)]
    return SIDNetwork(nn.Sequential(Weighed(4, 4), nn.ReLU()), heads, 3)


@pytest.mark.parametrize("where", ["stages", "extractor", "extractor, stacked"])
def test_own_terms_are_those_of_the_step_and_of_the_sum_of_all_losses(where):
    networks = [weighed(where) for _ in range(4)]
    inputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    output = networks[0](inputs, targets)
    output.loss.backward()
    weight = next(module for module in networks[0].modules() if isinstance(module, Weighed)).weight
    assert weight.grad.norm() > 1.5 * weight.norm()  # the term's part is twice the weight
    for network, schedule in zip(networks[1:], ("one-pass", "two-phase", "reference"), strict=True):
        result = sid_step(network, inputs, targets, schedule=schedule)
        torch.testing.assert_close(result.stage_loss, output.stage_loss)
        assert_equal_gradients(network, networks[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term, given", [(0.5, "float"), (torch.ones(3), r"a tensor \(3,\)")])
def test_a_term_that_is_no_scalar_is_refused(term, given):
    with pytest.raises(ValueError, match=f"loss must be a scalar tensor, not {given}"):
        add_stage_loss(term)


def test_class_weights_of_a_batch_that_is_ignored_are_no_division_by_zero():
    network, (inputs, targets) = small_network(), batch()
    network.loss_options = StageLossOptions(class_weight=torch.ones(10))
    output = network(inputs, torch.full_like(targets, -100))
    output.loss.backward()
    assert output.loss == 0 and all(not gradient.any() for gradient in gradients(network))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_class_weights_give_the_weighted_mean(kind):
    """Check that class weights give the weighted mean that `F.cross_entropy` defines."""
    network, (inputs, labels) = small_network(depth=1), batch()
    labels[2] = -100
    weight = torch.rand(10) + 0.1
    network.loss_options = StageLossOptions(1.0, class_weight=weight)
    targets = labels if kind == "labels" else torch.rand(6, 10).softmax(1)
    logits = network(inputs)
    if kind == "labels":
        expected = nn.functional.cross_entropy(logits, targets, weight)
    else:
        rows = nn.functional.cross_entropy(logits, targets, reduction="none")
        expected = (rows * (targets @ weight)).sum() / (targets @ weight).sum()
    expected.backward()
    full = [gradient.clone() for gradient in gradients(network)]
    network.zero_grad()
    output = network(inputs, targets)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    for own, its in zip(gradients(network), full, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrap", [tuple, lambda parts: {"images": parts[0]}])
def test_inputs_other_than_one_tensor_are_refused(wrap):
    inputs, targets = batch()
    with pytest.raises(TypeError, match="inputs must be one tensor, not a (tuple|dict); a network cut by names"):
        small_network()(wrap([inputs]), targets)


def test_class_weights_are_refused_for_stacked_heads():
    network, (inputs, targets) = build_network("mlp", image_size=SIZE, depth=2), batch()
    network.loss_options = StageLossOptions(class_weight=torch.ones(10))
    with pytest.raises(ValueError, match="class_weight must be None for StackedHeads"):
        network(inputs, targets)


def test_float16_gradients_survive_a_large_batch_and_a_grad_scaler():
    """Take a mean over 32768 rows: gradients are below 3e-5, where float16 has few bits."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    network, (inputs, targets) = cut(trunk, [3], 10, torch.zeros(1, 3, *SIZE), hidden_dim=16), batch(32768)
    other = copy.deepcopy(network)
    other(inputs, targets).loss.backward()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.float16):
        output = network(inputs, targets)
    scaler.scale(output.loss).backward()
    scaler.unscale_(optimizer)
    assert scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"][torch.device("cpu")].item() == 0
    for own, full in zip(gradients(network), gradients(other), strict=True):
        assert (own - full).norm() < 0.03 * full.norm()  # 0.27 without float16_scale


@pytest.mark.parametrize("layout", ["stagewise", "shared"])
def test_large_activations_overflow_no_float16_gradient_for_ever(layout):
    """A GradScaler lowers its own scale until steps are taken, but not one inside of the stages."""
    torch.manual_seed(0)
    network, (inputs, targets) = build_network("mlp", layout, image_size=SIZE, depth=2, fused=False), batch(32)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = network(inputs * 255, targets).loss  # pixels as they are
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() >= 1 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layout", ["stagewise", "shared"])
def test_float16_gradients_of_the_first_layers_are_near_those_of_float32(layout):
    torch.manual_seed(0)
    network, (inputs, targets) = build_network("mlp", layout, image_size=SIZE, depth=2, fused=False), batch(16384)
    other = copy.deepcopy(network)
    other(inputs, targets).loss.backward()
    with torch.autocast("cpu", torch.float16):
        network(inputs, targets).loss.backward()
    own, full = next(network.parameters()).grad, next(other.parameters()).grad
    assert (own - full).norm() < 0.05 * full.norm()  # shared: 0.46 without float16_scale


def held_bytes(run):
    """Return the most bytes that autograd holds at a time."""
    held, most = 0, 0

    class Held:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor = tensor
            self.size = 0 if isinstance(tensor, nn.Parameter) else tensor.untyped_storage().nbytes()
            held += self.size
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    with saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return most


def deep_network(kind, depth):
    if kind == "stages":
        return build_network("mlp", "stagewise", image_size=SIZE, depth=depth)
    layers = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(192 if i == 0 else 256, 256), nn.ReLU(inplace=True)]
    return cut(nn.Sequential(*layers), [str(2 * i + 2) for i in range(depth)], 10, batch(2)[0])


@pytest.mark.parametrize("kind", ["stages", "names"])
def test_activations_do_not_grow_with_depth(kind):
    inputs, targets = batch(64)
    bytes_of = {}
    for depth in (4, 32):
        network = deep_network(kind, depth)
        bytes_of[depth] = held_bytes(lambda network=network: network(inputs, targets).loss.backward())
    assert bytes_of[4] > 0 and bytes_of[32] <= 1.02 * bytes_of[4]
    step = build_network("mlp", "stagewise", image_size=SIZE, depth=4)
    assert bytes_of[4] <= 1.02 * held_bytes(lambda: sid_step(step, inputs, targets))
