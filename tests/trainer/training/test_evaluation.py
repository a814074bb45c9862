"""Test what `evaluate` says of every stage, against its definition in float64 and in plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sid_trainer import SIDNetwork, build_network
from sid_trainer.methods.common import StepOptions
from sid_trainer.training.evaluation import evaluate

CLASSES = 7


def definition(logits, labels, alphas, divergence, smoothing):
    """Compute accuracy, KL(y || p) and premise, (L, N) each, of logits (L, N, C), in float64."""
    q = torch.full(logits.shape[1:], 1 / CLASSES, dtype=torch.float64)
    y = (1 - smoothing) * F.one_hot(labels, CLASSES).double() + smoothing / CLASSES
    metrics = []

    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0).sum(1)

    def loss(p, alpha):
        if divergence == "forward":
            return alpha * -(y * p.log()).sum(1) + (1 - alpha) * kl(q, p)
        return alpha * kl(p, y) + (1 - alpha) * kl(p, q)

    for z, alpha in zip(logits.double(), alphas, strict=True):
        p = z.softmax(1)
        right = (p.argmax(1) == labels).double()
        metrics.append((right, -p[torch.arange(len(labels)), labels].log(), loss(p, alpha) - loss(q, alpha)))
        q = p
    right, distance, worse = (torch.stack(rows) for rows in zip(*metrics, strict=True))
    return right, distance, worse


class Given(nn.Module):
    """A stage whose logits are columns of its inputs, times a number."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, features, prior):
        return features, features[:, self.stage * CLASSES : (self.stage + 1) * CLASSES]


def given(logits):
    """Return a network, and inputs for which its stages' logits are these: (L, N, C)."""
    network = SIDNetwork(nn.Identity(), [Given(i) for i in range(len(logits))], CLASSES)
    return network, logits.permute(1, 0, 2).flatten(1)


@pytest.mark.parametrize(("divergence", "smoothing"), [("forward", 0.0), ("forward", 0.1), ("reverse", 0.1)])
@pytest.mark.parametrize("batch", [5, 64, 1000])
def test_against_the_definition(divergence, smoothing, batch):
    alphas = [0.9, 0.5, 0.2, 1.0]
    logits, labels = torch.randn(4, 203, CLASSES) * 2, torch.randint(0, CLASSES, (203,))
    logits[1:] = 0.7 * logits[1:] + logits[:-1]
    network, inputs = given(logits)
    network.train()
    batches = zip(inputs.split(batch), labels.split(batch), strict=True)
    actual = evaluate(network, batches, StepOptions(alphas, divergence, smoothing))
    right, distance, worse = definition(logits, labels, alphas, divergence, smoothing)
    assert not network.training
    assert actual["accuracy"] == right.mean(1).tolist()
    assert actual["kl"] == pytest.approx(distance.mean(1).tolist(), rel=1e-6)
    assert worse.abs().min() > 2e-5  # so that float32 decides as float64 does
    assert actual["certificate"] == (worse <= 0).double().mean(1).tolist()
    assert all(0 < rate < 1 for rate in actual["certificate"])


def test_a_real_network_in_either_layout():
    for layout in ("shared", "stagewise"):
        network = build_network("mlp", layout, num_classes=CLASSES, in_channels=1, image_size=(4, 4), depth=3)
        inputs, labels = torch.randn(60, 1, 4, 4), torch.randint(0, CLASSES, (60,))
        actual = evaluate(network, [(inputs, labels)], StepOptions())
        with torch.no_grad():
            logits = torch.stack(network.double().stage_logits(inputs.double()))
        right, distance, worse = definition(logits, labels, [0.5] * 3, "forward", 0.0)
        assert actual["accuracy"] == right.mean(1).tolist()
        assert actual["kl"] == pytest.approx(distance.mean(1).tolist(), rel=1e-5)
        assert actual["certificate"] == pytest.approx((worse <= 0).double().mean(1).tolist(), abs=1 / 60)


def test_in_bfloat16_it_says_nearly_the_same():
    network = build_network("mlp", "stagewise", num_classes=CLASSES, in_channels=1, image_size=(4, 4), depth=2)
    batch = [(torch.randn(60, 1, 4, 4), torch.randint(0, CLASSES, (60,)))]
    full, half = (evaluate(network, batch, StepOptions(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert half["kl"] == pytest.approx(full["kl"], rel=0.02) and half["kl"] != full["kl"]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.0])
def test_where_the_premise_holds_so_does_the_inequality(alpha):
    """Check KL(y || p) <= KL(y || q) - (1 - alpha) / alpha KL(q || p) for any beliefs, image by image."""
    counted = 0
    for sharpness in (0.1, 1.0, 5.0):
        logits, labels = torch.randn(2, 300, CLASSES) * sharpness, torch.randint(0, CLASSES, (300,))
        logits[1] = logits[0] + logits[1] * torch.rand(300, 1)  # from copies to anything
        network, inputs = given(logits)
        q, p = logits.double().softmax(2)
        image = torch.arange(300)
        gain = q[image, labels].log().neg() - p[image, labels].log().neg()  # KL(y || q) - KL(y || p)
        moved = (q * (q / p).log()).sum(1)
        for i in range(300):
            (_, holds) = evaluate(network, [(inputs[i : i + 1], labels[i : i + 1])], StepOptions([1.0, alpha]))[
                "certificate"
            ]
            if holds:
                counted += 1
                assert gain[i] >= (1 - alpha) / alpha * moved[i] - 1e-4  # of rounding, divided by alpha
    assert 50 < counted < 850


@pytest.mark.parametrize(("divergence", "smoothing"), [("forward", 0.0), ("forward", 0.1), ("reverse", 0.1)])
def test_a_perfect_copy_does_no_worse_than_itself(divergence, smoothing):
    class Copy(nn.Module):
        def forward(self, features, prior):
            return features, prior.log()

    labels = torch.randint(0, CLASSES, (500,))
    network = SIDNetwork(nn.Identity(), [Copy(), Given(0), Copy(), Copy()], CLASSES)
    options = StepOptions(0.5, divergence, smoothing)
    actual = evaluate(network, [(torch.randn(500, CLASSES) * 3, labels)], options)
    first, given_, *copies = actual["certificate"]
    assert first == 1 and copies == [1, 1] and 0 < given_ < 1
    assert actual["kl"][0] == pytest.approx(math.log(CLASSES)) and actual["kl"][2] == pytest.approx(actual["kl"][1])


def test_a_belief_without_mass_on_the_truth_is_infinitely_far():
    logits = torch.zeros(2, 4, CLASSES)
    logits[1, :, 0] = 1000.0
    network, inputs = given(logits)
    actual = evaluate(network, [(inputs, torch.tensor([0, 0, 1, 1]))], StepOptions([0.5, 1.0]))
    assert actual["accuracy"] == [0.5, 0.5] and actual["kl"][1] == pytest.approx(500)
    assert actual["certificate"] == [1, 0.5]
