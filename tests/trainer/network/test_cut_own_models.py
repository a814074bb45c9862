"""Test your own models that are hard to cut: masks that make nested tensors, idle experts, skips, recomputation."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.drop_in import train_steps
from sid_trainer import cut

CLASSES, BATCH = 3, 4
LABELS = torch.tensor([0, 1, 2, 0])


def train(network, inputs, targets=LABELS, steps=15):
    return train_steps(network, inputs, targets, steps, lr=1e-2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)

    def forward(self, ids, keep):
        return self.layers(self.embed(ids), src_key_padding_mask=~keep)


def test_an_encoder_of_pytorch_with_a_padding_mask():
    """Cut PyTorch's encoder, which in evaluation passes nested tensors between layers unless told not to."""
    torch.manual_seed(0)
    keep = torch.ones(BATCH, 6, dtype=torch.bool)
    keep[0, 3:] = False
    inputs = {"ids": torch.randint(9, (BATCH, 6)), "keep": keep}
    network = cut(Encoder(), ["layers.layers.0", "layers.layers.1"], CLASSES, inputs, mask="keep")
    first, last = train(network, inputs)
    assert (last < first).all()
    other = {"ids": inputs["ids"].masked_fill(~keep, 5), "keep": keep}
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(inputs), network(other))
    assert torch.backends.mha.get_fastpath_enabled()


class Experts(nn.Module):
    """A mixture in which each row goes to one expert."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        share, chosen = self.gate(x).softmax(-1).max(-1)
        outputs = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (rows := chosen == i).any():
                outputs[rows] = expert(x[rows]) * share[rows, None]
        return x + outputs


def test_experts_that_the_example_does_not_choose_are_trained():
    torch.manual_seed(0)
    network = cut(nn.Sequential(Experts(), Experts()), ["0", "1"], CLASSES, torch.randn(1, 8))
    assert not network.untrained and [len(names) for names in network.stage_parameters] == [10, 10]
    network(torch.randn(200, 8), torch.arange(200) % CLASSES).loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_what_is_computed_before_a_cut_for_later_stages_only_is_warned_of():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.side, self.first, self.second, self.rest = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            side = self.side(x)
            return self.rest(self.second(self.first(x) + side))

    with pytest.warns(UserWarning, match="no stage trains side.weight and 1 more: the loss of the stage in which"):
        network = cut(Side(), ["first", "second"], CLASSES, torch.randn(2, 8))
    assert network.untrained == ["side.weight", "side.bias", "rest.weight", "rest.bias"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        side = Side()
        side.side.requires_grad_(False)
        cut(side, ["first", "second"], CLASSES, torch.randn(2, 8))
        assert not cut(Side(), ["second"], CLASSES, torch.randn(2, 8), own_classifier=False).stage_parameters[1:]


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x * 1, use_reentrant=self.reentrant) if self.training else block(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_around_a_cut_is_refused_and_within_a_block_it_is_not(reentrant):
    network = cut(Recomputed(reentrant), ["blocks.0", "blocks.1"], CLASSES, torch.randn(2, 8))
    with pytest.raises(ValueError, match="at must name modules outside of gradient checkpointing and no_grad, unlike"):
        network(torch.randn(BATCH, 8), LABELS)
    network = cut(nn.Sequential(Recomputed(False), Recomputed(False)), ["0", "1"], CLASSES, torch.randn(2, 8))
    first, last = train(network, torch.randn(BATCH, 8))
    assert (last < first).all()


def test_a_block_that_is_dropped_in_training_is_refused_when_it_is():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = x if self.training and i == 2 else block(x)
            return x

    network = cut(Dropped(), [f"blocks.{i}" for i in range(3)], CLASSES, torch.randn(2, 8))
    with pytest.raises(ValueError, match="at must name modules that run in every call: 'blocks.2' did not"):
        network(torch.randn(BATCH, 8), LABELS)


def conv(before, after, stride=1):
    return nn.Sequential(nn.Conv1d(before, after, 3, stride, padding=1), nn.ReLU())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("own_classifier", [False, True])
@pytest.mark.parametrize("steps", [10, CLASSES])
def test_a_series_with_a_class_for_each_step(own_classifier, stride, steps):
    """Check that logits are (B, C, T), as those of the model; also if there are as many steps as classes."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 6, stride), conv(6, 6), nn.Upsample(steps), nn.Conv1d(6, CLASSES, 1))
    inputs = torch.randn(BATCH, 2, steps)
    options = {"per_position": True, "own_classifier": own_classifier, "channels": "first"}
    network = cut(model, ["0", "1"], CLASSES, inputs, **options)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0)
    first, last = train(network, inputs, targets, 40)
    assert last.sum() < first.sum()
    output = network(inputs, targets)
    assert output.logits.shape == network(inputs).shape == model(inputs).shape == (BATCH, CLASSES, steps)
    torch.testing.assert_close(output.logits, network(inputs))
    if own_classifier:
        torch.testing.assert_close(output.logits, model(inputs))
    soft = torch.nn.functional.one_hot(targets, CLASSES).float()
    torch.testing.assert_close(network(inputs, soft).loss, output.loss)
    with pytest.raises(ValueError, match=r"targets must be one for each position of features \(4, 6, .*\), not \(4,\)"):
        network(inputs, LABELS)


def test_voxels():
    torch.manual_seed(0)
    inputs = torch.randn(2, 1, 4, 6, 8)
    network = cut(nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1)), ["0"], CLASSES, inputs, per_position=True)
    output = network(inputs, (inputs[:, 0] > 0).long())
    output.loss.backward()
    assert output.logits.shape == network(inputs).shape == (2, CLASSES, 4, 6, 8)


def test_pixels_of_images_with_their_channels_last():
    torch.manual_seed(0)
    inputs = torch.randn(2, 6, 8, 3)
    network = cut(nn.Sequential(nn.Linear(3, 8)), ["0"], CLASSES, inputs, per_position=True)
    output = network(inputs, torch.zeros(2, 6, 8, dtype=torch.long))
    torch.testing.assert_close(output.logits, network(inputs))


def test_heads_have_the_dtype_of_the_model_if_it_is_cut_within_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        network = cut(nn.Sequential(nn.Linear(8, 8)), ["0"], CLASSES, torch.randn(2, 8))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
