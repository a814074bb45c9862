"""Test operations that are counted before training, and images that leave the cascade early."""

import pytest
import torch

from sid_trainer import build_network
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import LOCAL
from sid_trainer.network.modules import certainty
from sid_trainer.training.evaluation import accuracy, exit_curve
from sid_trainer.training.operations import exit_operations, training_operations

SHAPE = (1, 8, 8)


def make(layout="stagewise", **settings):
    torch.manual_seed(0)
    return build_network("mlp", layout, num_classes=5, in_channels=1, image_size=(8, 8), **settings).eval()


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(40, *SHAPE, generator=generator), torch.randint(5, (40,), generator=generator)


def layer(inputs, outputs):
    return 2 * inputs * outputs  # a product and a sum for each weight


def test_operations_of_a_cascade_are_those_of_its_layers():
    network = make(depth=3, hidden_dim=16)
    head = layer(256 + 5, 16) + layer(16, 5)
    first = layer(64, 256) + head
    later = layer(256, 256) + head
    assert exit_operations(network, SHAPE) == [first, first + later, first + 2 * later]
    assert exit_operations(network.plain(), SHAPE) == [layer(64, 256) + 2 * layer(256, 256) + head]
    # A layer's backward has a product for the gradient of its weights and one for that of its input. No stage needs
    # its input's: the body is the first layer of the stage, and the belief is constant.
    body, hidden, logits = layer(256, 256), layer(261, 16), layer(16, 5)
    a_stage = 2 * body + 3 * hidden + 3 * logits
    expected = a_stage - 2 * body + 2 * layer(64, 256) + 2 * a_stage
    assert training_operations(network, "sid", SHAPE) == expected


@pytest.mark.parametrize("method", [*LOCAL, "deep-supervision", "bp"])
def test_counting_changes_nothing(method):
    network = make(norm=True, prior_dropout=0.5, plain=method == "bp", fused=False).train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert training_operations(network, method, SHAPE) > exit_operations(network, SHAPE)[-1] > 0
    assert torch.equal(torch.get_rng_state(), state) and network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("settings", [{}, {"norm": True, "tail": 1}, {"layout": "shared", "depth": 4}])
@pytest.mark.parametrize("confidence", [0.0, 0.505, 0.51, 0.52, 0.55, 1.0])
def test_an_image_leaves_at_the_first_stage_that_is_sure(settings, confidence):
    network = make(**settings)
    ran: list[int] = []
    if not settings.get("layout"):
        for stage in network.stages:
            stage.register_forward_hook(lambda module, inputs, outputs: ran.append(len(inputs[0])))
    for inputs, _ in batches(1):
        beliefs = network.beliefs(inputs)
        ran.clear()
        result = network.predict(inputs, confidence)
        first, second = beliefs.sort(dim=2, descending=True).values[:, :, :2].unbind(2)
        certain = first / (first + second)
        for i, stage in enumerate(result.stage.tolist()):
            torch.testing.assert_close(result.logits[i].softmax(0), beliefs[stage, i])
            assert (certain[:stage, i] < confidence).all()
            assert stage == network.depth - 1 or certain[stage, i] >= confidence
        if ran:
            left = [int((result.stage >= i).sum()) for i in range(network.depth)]
            assert ran == [count for count in left if count]


def test_the_curve_is_the_accuracy_of_predictions():
    network, options = make(), StepOptions()
    confidences = [0.0, 0.505, 0.51, 0.52, float("inf")]
    curve = exit_curve(network, batches(), options, confidences)
    stages = set()
    for confidence, (right, shares) in zip(confidences[:-1], curve, strict=False):
        assert right == accuracy(lambda x, c=confidence: network.predict(x, c).logits, batches(), options)
        left = torch.cat([network.predict(inputs, confidence).stage for inputs, _ in batches()])
        assert shares == pytest.approx([(left == i).double().mean().item() for i in range(4)])
        stages.update(left.tolist())
    assert stages == {0, 1, 2, 3}, "confidences at which some image leaves at every stage"
    assert curve[-1] == (accuracy(network, batches(), options), [0, 0, 0, 1])


def test_certainty_is_that_of_the_two_largest_entries():
    """Check a belief by hand, and that mixing beliefs with the uniform one can only change the certainty a little."""
    belief = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(certainty(belief), torch.tensor([2 / 3, 0.5, 1.0]))
    assert belief[2].lerp(torch.full((4,), 0.25), 0.5).amax() < 0.7 < certainty(belief.lerp(belief[1:2], 0.5))[2]


def test_a_confidence_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], not 2"):
        make().predict(next(batches(1))[0], 2)
