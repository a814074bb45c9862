"""Test that every method trains every network in both layouts, on real digits, and what sets each method apart."""

import pytest
import torch
import torch.nn.functional as F

from sid_trainer import bp_step, build_network, deep_supervision_step, load_data, sid_step
from sid_trainer.data.batches import Batches, pixel_statistics
from sid_trainer.data.splits import take_subset
from sid_trainer.methods.common import STEP_SCHEDULES, StepOptions
from sid_trainer.methods.factory import BACKPROPAGATED, METHODS, make_lr_scheduler, make_optimizers, make_step
from sid_trainer.network.architectures import LAYOUTS, TRUNKS
from sid_trainer.training.config import TrainConfig

# Every method on a small network, SID on all, backpropagation on a small convolutional one; the rest is slow.
IN_SHORT = {"sid": TRUNKS, "bp": ("mlp", "simple_cnn")}
CELLS = [
    pytest.param(a, b, m, id=f"{a}-{b}-{m}", marks=[] if a in IN_SHORT.get(m, ["mlp"]) else [pytest.mark.slow])
    for a in TRUNKS
    for b in LAYOUTS
    for m in METHODS
]


def make(arch, layout, method="sid", **options):
    torch.manual_seed(0)
    plain = layout == "stagewise" and method in BACKPROPAGATED
    return build_network(arch, layout, in_channels=1, image_size=(8, 8), plain=plain, **options)


@pytest.fixture(scope="module")
def digits():
    data = take_subset(load_data("digits"), 160)
    return Batches(data.train, 40, torch.device("cpu"), *pixel_statistics(data.train.images))


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_but_sid_learn_and_are_judged_by_a_cross_entropy(method):
    config = TrainConfig(method=method, alpha=(0.3, 0.4), divergence="reverse", label_smoothing=0.1)
    assert (config.alpha, config.divergence) == (((0.3, 0.4), "reverse") if method == "sid" else (1.0, "forward"))


@pytest.mark.parametrize(("arch", "layout", "method"), CELLS)
def test_every_method_trains_every_network(arch, layout, method, digits):
    """Check that small networks classify the trained images far better than by chance (10%).

    The loss of large ones falls on a batch that they see a few times.
    """
    network = make(arch, layout, method, depth=4 if layout == "shared" else None)
    large = arch not in ("simple_cnn", "mlp")
    optimizers = make_optimizers(network, method, optimizer="adam", lr=3e-4 if large else 3e-3)
    step = make_step(method, network, optimizers, StepOptions(0.7))
    inputs, targets = next(digits.in_order())
    batches = [(inputs[:8], targets[:8])] * 5 if large else None
    for epoch in range(1 if large else 12):
        right, losses = 0, []
        for inputs, targets in batches or digits.shuffle(0, epoch, 0, False):
            result = step(inputs, targets)
            losses.append(result.stage_loss.mean().item())
            right += (result.logits.argmax(1) == targets).sum().item()
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < 0.97 * losses[0] if large else right / 160 > 0.4, (losses, right)


SMOOTHED = [{"label_smoothing": 0.1}, {"label_smoothing": 0.1, "divergence": "reverse"}]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arch", "options"),
    [pytest.param(arch, {}, marks=pytest.mark.slow if arch == "vit_tiny" else ()) for arch in TRUNKS]
    + [("simple_cnn", options) for options in SMOOTHED],
    ids=str,
)
def test_the_schedules_have_the_same_gradients(arch, layout, options):
    """Compare in float64, relative to the largest gradient of the stage a parameter belongs to."""
    network = make(arch, layout, depth=3 if layout == "shared" else None).double()
    inputs, targets = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (4,))
    alphas = [0.9 - 0.1 * i for i in range(len(network.stages))]
    actual, losses = {}, {}
    for schedule in STEP_SCHEDULES:
        network.zero_grad()
        losses[schedule] = sid_step(network, inputs, targets, alphas, schedule=schedule, **options).stage_loss
        actual[schedule] = [p.grad.clone() for p in network.parameters()]
    groups = [list(m.parameters()) for m in network.local_modules if list(m.parameters())]
    for schedule in STEP_SCHEDULES[1:]:
        torch.testing.assert_close(losses[schedule].double(), losses["one-pass"].double())
        ours, theirs = iter(actual["one-pass"]), iter(actual[schedule])
        for group in groups:
            pairs = [(next(ours), next(theirs)) for _ in group]
            largest = max(a.abs().max() for a, _ in pairs)
            assert largest > 0
            assert all((a - b).abs().max() <= 1e-9 * largest for a, b in pairs), schedule


def gradients(network, step, *arguments, **options):
    network.zero_grad()
    result = step(network, *arguments, **options)
    return result, [p.grad.clone() for p in network.parameters()]


def assert_same(actual, expected, rounding=1e-4):
    largest = max(b.abs().max() for b in expected)
    assert all((a - b).abs().max() <= rounding * largest for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_three_forms_of_backpropagation_agree(layout):
    """Compare on a network without batch-norm, for which a part of the batch is as good as all of it."""
    network = make("simple_cnn", layout, "bp", depth=3 if layout == "shared" else None)
    inputs, targets = torch.randn(11, 1, 8, 8), torch.randint(0, 10, (11,))
    network.zero_grad()
    F.cross_entropy(network(inputs), targets).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    for options in BACKPROPAGATED.values():
        result, actual = gradients(network, bp_step, inputs, targets, **options)
        assert_same(actual, expected)
        torch.testing.assert_close(result.stage_loss, F.cross_entropy(network(inputs), targets).detach().reshape(1))
        torch.testing.assert_close(result.logits, network(inputs).detach())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_batch_norm_once(momentum):
    inputs, targets = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
    actual = []
    for checkpointed in (False, True):
        network = make("vgg11", "stagewise", "bp")
        norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = momentum
        for _ in range(2):
            _, grads = gradients(network, bp_step, inputs, targets, checkpointed=checkpointed)
        assert len(norms) == 8 and all(norm.momentum == momentum for norm in norms)
        actual.append([*grads, *network.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_supervision_and_greedy_against_their_definitions(layout):
    network = make("simple_cnn", layout, depth=3 if layout == "shared" else None)
    inputs, targets = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    network.zero_grad()
    sum(F.cross_entropy(z, targets) for z in network.stage_logits(inputs)).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    _, actual = gradients(network, deep_supervision_step, inputs, targets)
    assert_same(actual, expected)

    network.zero_grad()
    features, prior = network.extractor(inputs), torch.full((8, 10), 0.1)
    for stage in network.stages:  # cross-entropies alone, detached
        seen, z = stage(features, prior)
        F.cross_entropy(z, targets).backward(retain_graph=True)
        features, prior = seen if layout == "shared" else seen.detach(), z.softmax(1).detach()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    make_step("greedy", network, (), StepOptions(0.3))(inputs, targets)
    assert_same([p.grad for p in network.parameters()], expected)


def test_the_features_of_a_stagewise_network_are_not_those_of_the_stage_after_its_update():
    """Check that a stage passes on what it computed before its update: the same as without optimizers."""
    for lr in (0.0, 0.5):
        network = make("mlp", "stagewise")
        inputs, targets = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        expected = sid_step(network, inputs, targets)
        network.zero_grad()
        optimizers = [None, *(torch.optim.SGD(stage.parameters(), lr) for stage in network.stages)]
        actual = sid_step(network, inputs, targets, 0.5, optimizers)
        assert torch.equal(actual.stage_loss, expected.stage_loss) and torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("name", ["constant", "cosine", "one-cycle"])
def test_learning_rates(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = make_lr_scheduler(optimizer, name, 0.2, 100)
    rates = []
    for _ in range(100):
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert max(rates) == pytest.approx(0.2, rel=1e-3)
    if name == "constant":
        assert min(rates) == 0.2
    else:
        assert rates[-1] < 0.002 and scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-6)
        assert (rates[0] == 0.2) == (name == "cosine")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_is_owned_once(layout, optimizer):
    for method in METHODS:
        network = make("simple_cnn", layout, method)
        before = [p.detach().clone() for p in network.parameters()]
        optimizers = make_optimizers(network, method, optimizer=optimizer, lr=0.1, weight_decay=0.1)
        make_step(method, network, optimizers)(torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,)))
        moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
        assert all(moved), (method, moved)
