"""Test the networks: what they are made of, where they are cut, what is refused."""

import pytest
import torch
from torch import nn

from helpers.stages import values
from sid_trainer import build_network, cut, sid_step
from sid_trainer.network.architectures import LAYOUTS, TRUNKS
from sid_trainer.network.heads import FeaturePooling, StackedHeads, StageHead
from sid_trainer.training.config import by_depth

CELLS = [(arch, layout) for arch in TRUNKS for layout in LAYOUTS]


@pytest.mark.parametrize(("arch", "layout"), CELLS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_every_network_turns_images_into_beliefs(arch, layout, shape):
    network = build_network(arch, layout, num_classes=7, in_channels=shape[0], image_size=shape[1:]).eval()
    beliefs = network.beliefs(torch.randn(3, *shape))
    assert beliefs.shape == (10 if layout == "shared" else len(network.stages), 3, 7)
    torch.testing.assert_close(beliefs.sum(2), torch.ones(beliefs.shape[:2]))
    plain = build_network(arch, layout, num_classes=7, in_channels=shape[0], image_size=shape[1:], plain=True)
    assert plain.eval()(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(("arch", "depth", "stages"), [
    ("simple_cnn", None, [(32, 32, 32), (64, 16, 16), (128, 16, 16), (128, 8, 8)]),
    ("vgg11", None, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]),
    ("resnet18", 4, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    ("resnet18", 8, [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2),
    ("vit_tiny", 4, [(64, 192)] * 4), ("vit_tiny", 12, [(64, 192)] * 12), ("mlp", 3, [(256,)] * 3),
], ids=str)  # fmt: skip
def test_the_cuts_of_the_method(arch, depth, stages):
    """Check where each backbone is cut for 32x32 images, by the shapes of the features that pass between stages."""
    network, features, actual = build_network(arch, "stagewise", depth=depth).eval(), torch.zeros(2, 3, 32, 32), []
    for stage in network.stages:
        features = stage.body(features)
        actual.append(tuple(features.shape[1:]))
    assert actual == stages


def test_resnet18_and_vgg11_are_torchvisions():
    """Compare with torchvision's networks with the same parameters, except for stem and pooling."""
    from torchvision.models import resnet18

    ours, theirs = build_network("resnet18", "stagewise", plain=True, grid=1), resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    values = [tensor.clone() for tensor in ours.state_dict().values()]
    assert [v.shape for v in values] == [v.shape for v in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    convolutions = [m for m in build_network("vgg11", "stagewise").modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 256, 512, 512, 512, 512]


@pytest.mark.parametrize("arch", list(TRUNKS))
def test_no_gradient_crosses_a_cut(arch):
    """Check that a stage's gradients do not change when all losses of later stages do."""
    torch.manual_seed(0)
    network = build_network(arch, "stagewise", in_channels=1, image_size=(8, 8))
    inputs, targets = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
    depth = len(network.stages)
    gradients = []
    for last in (0.0, 1.0):
        network.zero_grad()
        sid_step(network, inputs, targets, [0.5] * (depth - 1) + [last])
        gradients.append([[p.grad.clone() for p in stage.parameters()] for stage in network.stages])
    for before, after in zip(gradients[0][:-1], gradients[1][:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gradients[0][-1], gradients[1][-1], strict=True))
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in network.stages[0].body.parameters() if p.dim() > 1
    )


def test_any_sequential_can_be_cut():
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20))
    statistics = trunk[1].running_mean.clone()
    network = cut(trunk, [3], 5, torch.zeros(1, 3, 8, 8), head_depth=2, hidden_dim=16)
    assert torch.equal(trunk[1].running_mean, statistics)  # the example left no trace
    assert [len(stage.body) for stage in network.stages] == [3, 2]
    assert network.stages[0].body[0] is trunk[0]
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 5
    optimizers = [None, *(torch.optim.Adam(stage.parameters(), 1e-2) for stage in network.stages)]
    losses = [sid_step(network, images, labels, 0.9, optimizers).stage_loss for _ in range(40)]
    assert (losses[-1] < 0.5 * losses[0]).all()
    assert len(cut(trunk, [], 5, torch.zeros(1, 3, 8, 8)).stages) == 1


@pytest.mark.parametrize("at", [[0], [5], [3, 3], [3, 1], [-1]])
def test_a_cut_that_leaves_a_stage_empty_is_refused(at):
    trunk = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    with pytest.raises(ValueError, match=r"at must be increasing numbers of layers in 1\.\.4, not \["):
        cut(trunk, at, 3, torch.zeros(1, 4))


def test_pooling_and_heads():
    images = torch.randn(2, 6, 5, 7)
    assert torch.allclose(FeaturePooling((6, 5, 7))(images), images.mean((2, 3)), atol=1e-6)
    assert FeaturePooling((6, 5, 7), 4).dim == 6 * 16 and FeaturePooling((6, 2, 3), 4).dim == 6 * 6
    tokens = torch.randn(2, 9, 6)
    torch.testing.assert_close(FeaturePooling((9, 6))(tokens), nn.functional.layer_norm(tokens, (6,)).mean(1))
    with pytest.raises(ValueError, match=r"shape must have 1 to 4 dimensions, .*, not \(1, 2, 3, 4, 5\)"):
        FeaturePooling((1, 2, 3, 4, 5))
    for depth in range(4):
        head = StageHead(6, 3, 16, depth=depth)
        linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
        assert len(linear) == depth + 1 and head(torch.randn(2, 6), torch.full((2, 3), 1 / 3)).shape == (2, 3)


@pytest.mark.parametrize("arch", list(TRUNKS))
def test_stacked_heads_are_drawn_as_stages_are(arch):
    networks = []
    for fused in (True, False):
        torch.manual_seed(0)
        networks.append(build_network(arch, in_channels=1, image_size=(8, 8), depth=3, fused=fused))
    assert isinstance(networks[0].stages, StackedHeads) and isinstance(networks[1].stages, nn.ModuleList)
    (ours, theirs), images = (values(network) for network in networks), torch.randn(2, 1, 8, 8)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(*(network.eval().beliefs(images) for network in networks))
    for other in ({"head_depth": 2}, {"head_depth": 0}, {"layout": "stagewise"}):
        assert isinstance(build_network(arch, in_channels=1, image_size=(8, 8), **other).stages, nn.ModuleList)


@pytest.mark.parametrize(("options", "message"), [
    ({"arch": "lenet"}, "arch must be one of simple_cnn, vgg11, resnet18, vit_tiny, mlp, gpt, not 'lenet'"),
    ({"layout": "ring"}, "layout must be one of shared, stagewise, not 'ring'"),
    ({"depth": 0}, "depth must be at least 1, not 0"),
    ({"arch": "resnet18", "layout": "stagewise", "depth": 5}, "depth must be 4, 8 for a stagewise resnet18, not 5"),
    ({"arch": "vit_tiny", "layout": "stagewise", "depth": 5}, "depth must be 1, 2, 3, 4, 6, 12 for a stagewise vit_tiny"),
    ({"num_classes": 1}, "num_classes must be at least 2, not 1"),
    ({"head_depth": -1}, "head_depth must be a whole number of at least 0, not -1"),
    ({"arch": "vit_tiny", "image_size": (32, 28)}, "image_size must be square for vit_tiny, not 32x28"),
])  # fmt: skip
def test_what_makes_no_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_network(**options)


def test_alpha_by_depth():
    assert by_depth("alpha", "0.9:0.3", 4) == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert by_depth("alpha", "0.9,0.5", 2) == [0.9, 0.5]
    assert by_depth("alpha", 0.4, 3) == by_depth("alpha", "0.4", 3) == [0.4] * 3
    for wrong in ("a", "0.9:0.5:0.1", "2", "", "0.5,", "0.9:0.5,0.1"):
        with pytest.raises(ValueError, match="alpha must be a number in"):
            by_depth("alpha", wrong, 4)


# ---------------------------------------------------------------- norms, tails, priors, plain inference

IMPROVED = {
    "norm and tail": {"norm": True, "tail": 1},
    "long tail": {"tail": 9},
    "no prior input": {"norm": True, "prior_input": False},
    "prior dropout": {"prior_dropout": 0.5},
    "deep heads": {"norm": True, "head_depth": 3},
}


@pytest.mark.parametrize("name", IMPROVED)
@pytest.mark.parametrize("arch", TRUNKS)
def test_no_gradient_crosses_a_stage_with(arch, name):
    torch.manual_seed(0)
    network = build_network(arch, "stagewise", image_size=(8, 8), **IMPROVED[name])
    inputs, targets, depth = torch.randn(4, 3, 8, 8), torch.arange(4), network.depth
    gradients = []
    for last in (0.0, 1.0):
        torch.manual_seed(1)
        network.zero_grad()
        sid_step(network, inputs, targets, [0.5] * (depth - 1) + [last])
        gradients.append([[p.grad.clone() for p in stage.parameters()] for stage in network.stages])
    for before, after in zip(gradients[0][:-1], gradients[1][:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gradients[0][-1], gradients[1][-1], strict=True))
    if "norm" not in name and "deep" not in name and "prior input" not in name:
        return
    norms = [sum(isinstance(m, nn.BatchNorm1d) for m in stage.head.modules()) for stage in network.stages]
    in_tails = sum(isinstance(m, nn.BatchNorm1d) for s in network.stages for m in s.head.pooling.modules())
    assert sum(norms) - in_tails == depth * IMPROVED[name].get("head_depth", 1)


def test_tails_are_new_blocks_shaped_as_the_following_ones():
    network = build_network("simple_cnn", "stagewise", tail=2)
    channels = [[m.out_channels for m in s.head.pooling.modules() if isinstance(m, nn.Conv2d)] for s in network.stages]
    assert channels == [[64, 128], [128, 128], [128], []]
    parameters = [parameter for stage in network.stages for parameter in stage.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)


def test_prior_dropout_gives_some_examples_the_uniform_belief_in_training_only():
    torch.manual_seed(0)
    head = StageHead(4, 3, prior_dropout=0.5)
    features, prior = torch.randn(1000, 4), torch.tensor([0.7, 0.2, 0.1]).repeat(1000, 1)
    kept, dropped = (head.eval()(features, p) for p in (prior, torch.full((1000, 3), 1 / 3)))
    actual = head.train()(features, prior)
    is_dropped = (actual == dropped).all(1)
    assert 400 < is_dropped.sum() < 600 and torch.equal(actual[~is_dropped], kept[~is_dropped])


def test_a_head_without_the_prior_as_input_ignores_it():
    head = StageHead(4, 3, prior_input=False)
    features = torch.randn(5, 4)
    assert torch.equal(head(features, torch.rand(5, 3)), head(features, torch.rand(5, 3)))


@pytest.mark.parametrize("arch", TRUNKS)
def test_the_plain_network_is_the_trunk_and_one_head(arch):
    network = build_network(arch, "stagewise", image_size=(8, 8), norm=True, tail=1, prior_input=False).eval()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(network.plain()(images), network(images))  # no head reads the belief
    torch.testing.assert_close(network.plain(0)(images), network.stage_logits(images)[0])
    whole, plain = (sum(p.numel() for p in n.parameters()) for n in (network, network.plain()))
    assert plain < whole
    expected = network.beliefs(images).log().mean(0)
    torch.testing.assert_close(network.averaged(images), expected)


def test_plain_inference_of_stacked_heads_is_refused():
    with pytest.raises(ValueError, match="plain inference needs a network of separate stages"):
        build_network("mlp", image_size=(8, 8), depth=2).plain()


def test_a_plain_network_may_have_the_head_of_the_last_stage():
    plain = build_network("simple_cnn", "stagewise", plain=True, classifier="mlp", norm=True)
    last = build_network("simple_cnn", "stagewise", norm=True, prior_input=False).stages[-1].head
    shapes = [{name: p.shape for name, p in head.named_parameters()} for head in (plain.stages[0].head, last)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": -1}, "tail must be at least 0, not -1"),
        ({"prior_dropout": 1.5}, r"prior_dropout must be in \[0, 1\], not 1.5"),
        ({"classifier": "svm"}, "classifier must be one of linear, mlp, not 'svm'"),
        ({"layout": "shared", "tail": 1}, "tail, prior_input and prior_dropout are for layout 'stagewise'"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        build_network("mlp", **{"layout": "stagewise"} | options)
