"""Tails for networks that are cut: blocks of a head's own, made like those that follow the cut."""

import copy

import pytest
import torch
from torch import nn

from sid_trainer import StageHead, StageLossOptions, cut


def convolutions(channels_in, channels, stride=2):
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU())


class Layers(nn.Module):
    """A model with its blocks side by side, as torchvision's ResNet has them."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = convolutions(3, 4), convolutions(4, 8), convolutions(8, 16)
        self.average, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, images):
        return self.classifier(self.average(self.layer3(self.layer2(self.layer1(images)))).flatten(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(4))

    def forward(self, tokens):
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


# model, cuts, shape of the inputs, and what the tails copy
CASES = {
    "layers": (Layers, ["layer1", "layer2", "layer3"], (8, 3, 16, 16), ["layer2", "layer3"]),
    "blocks": (Encoder, ["blocks.0", "blocks.2", "blocks.3"], (8, 6, 8), ["blocks.1", "blocks.3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_read_the_features_through_copies_of_the_blocks_that_follow(case):
    make, at, shape, following = CASES[case]
    torch.manual_seed(0)
    model, inputs, targets = make(), torch.randn(shape), torch.arange(shape[0]) % 5
    before = copy.deepcopy(model.state_dict())
    network = cut(model, at=at, num_classes=5, example=inputs[:2], tail=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    owned = {id(parameter) for parameter in model.parameters()}
    for head, name in zip(network.heads, following, strict=False):
        block = model.get_submodule(name)
        assert [p.shape for p in head.tail.parameters()] == [p.shape for p in block.parameters()]
        assert not owned & {id(parameter) for parameter in head.parameters()}
        pairs = zip(head.tail.parameters(), block.parameters(), strict=True)
        assert any(not torch.equal(own, theirs) for own, theirs in pairs)  # new ones
    assert isinstance(network.heads[-1], StageHead)  # nothing follows the last stage
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        output = network(inputs, targets)
        output.loss.backward()
        losses.append(output.loss.item())
        assert all(parameter.grad is not None for head in network.heads for parameter in head.parameters())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_tail_changes_the_gradients_of_its_own_stage_alone():
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    gradients = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        network = cut(Layers(), ["layer1", "layer2", "layer3"], 5, images, tail=2, prior_input=False)
        network.loss_options = StageLossOptions(alpha=1.0)  # later losses do not read the first belief
        with torch.no_grad():
            for parameter in network.heads[0].tail.parameters():
                parameter.mul_(scale)
        network(images, targets).loss.backward()
        gradients.append({name: p.grad for name, p in network.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 12  # 3 layers with weight and bias of a convolution and of a norm
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) == (not name.startswith("layer1")), name


def test_a_layer_has_the_last_word_on_the_layers_in_it():
    """Check that attention sets the bias of its output layer to 0, after that layer drew one."""
    network = cut(Encoder(), ["blocks.0", "blocks.1"], 5, torch.randn(2, 6, 8), tail=1)
    assert not network.heads[0].tail[0].self_attn.out_proj.bias.any()


def test_a_frozen_model_has_trained_tails():
    model = Layers().requires_grad_(False)
    network = cut(model, ["layer1", "layer2"], 5, torch.randn(2, 3, 16, 16), tail=1)
    assert all(parameter.requires_grad for parameter in network.heads.parameters())


def test_the_model_s_own_classifier_is_a_stage_after_the_last_tail():
    network = cut(Layers(), ["layer1", "layer2"], 5, torch.randn(2, 3, 16, 16), tail=1, own_classifier=True)
    assert [len(head.tail) for head in network.heads] == [1, 1]
    assert network.depth == 3


def test_cuts_by_indices_copy_the_stages_that_follow():
    trunk = nn.Sequential(convolutions(3, 4), convolutions(4, 8), convolutions(8, 16))
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    network = cut(trunk, [1, 2], 5, images, tail=2)
    assert [len(stage.head.pooling) for stage in network.stages] == [3, 2, 2]  # the tail, then the pooling's layers
    network(images, targets).loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


class NeedsMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 4)

    def forward(self, inputs, mask=None):
        return self.third(self.second(self.first(inputs), inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tail": -1}, "tail must be a whole number of at least 0, not -1"),
        ({"tail": 1.5}, "tail must be a whole number of at least 0, not 1.5"),
        ({"tail": 1, "heads": lambda i, x: StageHead(4, 5)}, "tail must be 0 with heads of your own, not 1"),
        ({"tail": 1, "mask": "mask"}, "tail must be 0 with a mask, not 1"),
        ({"tail": 1}, "tail must be 0 for this model: what follows first does not run on its features alone"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        example = {"inputs": torch.randn(2, 4), "mask": torch.ones(2, 4)}
        cut(NeedsMore(), ["first", "third"], 5, example, **arguments)
