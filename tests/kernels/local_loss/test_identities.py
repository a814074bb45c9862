"""Tests of the mathematics: minimizers, limits of alpha, equality with PyTorch's losses, descent."""

import pytest
import torch
import torch.nn.functional as F

from sid_kernels import fused_local_loss, local_loss_and_grad


def distributions(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("alpha", (0.2, 0.5, 0.9))
@pytest.mark.parametrize("classes", (3, 10, 300))
def test_forward_minimizer_is_the_arithmetic_mixture(backend, classes, alpha):
    y, q = distributions(6, classes, seed=1), distributions(6, classes, seed=2)
    z = (alpha * y + (1 - alpha) * q).log() + 4.0  # a constant changes nothing
    z, q, y = (x.to(backend.device) for x in (z, q, y))
    (_, belief, *_), gradient = local_loss_and_grad(z, q, y, alpha, reduction="sum", backend=backend.name)
    assert gradient.abs().max() < 1e-6
    elsewhere = local_loss_and_grad(z.roll(1, -1), q, y, alpha, reduction="sum", backend=backend.name)[1]
    assert elsewhere.abs().max() > 1e-3
    torch.testing.assert_close(belief, alpha * y + (1 - alpha) * q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alpha", (0.2, 0.5, 0.9))
@pytest.mark.parametrize("classes", (3, 10, 300))
def test_reverse_minimizer_is_the_geometric_mixture(backend, classes, alpha):
    y, q = distributions(6, classes, seed=1), distributions(6, classes, seed=2)
    z = alpha * y.log() + (1 - alpha) * q.log() - 4.0
    z, q, y = (x.to(backend.device) for x in (z, q, y))
    options = dict(divergence="reverse", reduction="sum", backend=backend.name)
    assert local_loss_and_grad(z, q, y, alpha, **options)[1].abs().max() < 2e-6
    assert local_loss_and_grad(z.roll(1, -1), q, y, alpha, **options)[1].abs().max() > 1e-3


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_alpha_one_is_cross_entropy(backend, smoothing, reduction):
    z = torch.randn(7, 19, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 18, 3, -100, 7, 7, -100], device=backend.device)
    options = dict(label_smoothing=smoothing, reduction=reduction)
    result = fused_local_loss(z, None, labels, 1.0, backend=backend.name, **options)
    expected = F.cross_entropy(z, labels, **options)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.fidelity, expected.detach())
    (actual,), (wanted,) = (torch.autograd.grad(loss.sum(), z) for loss in (result.loss, expected))
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("reduction", ("none", "batchmean", "sum"))
def test_alpha_zero_is_kl_div(backend, reduction):
    z = torch.randn(7, 19, device=backend.device, requires_grad=True)
    q = distributions(7, 19).to(backend.device)
    labels = torch.zeros(7, dtype=torch.int64, device=backend.device)
    expected = F.kl_div(z.log_softmax(-1), q, reduction=reduction)
    expected = expected.sum(-1) if reduction == "none" else expected
    result = fused_local_loss(z, q, labels, 0.0, reduction=reduction.replace("batch", ""), backend=backend.name)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.consistency, expected.detach())
    (actual,), (wanted,) = (torch.autograd.grad(loss.sum(), z) for loss in (result.loss, expected))
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_uniform_prior_is_no_prior(backend, divergence):
    z, y = torch.randn(5, 33, device=backend.device), distributions(5, 33).to(backend.device)
    options = dict(divergence=divergence, backend=backend.name)
    (without, gradient), (given, same) = (
        local_loss_and_grad(z, q, y, 0.3, **options) for q in (None, torch.full_like(z, 1 / 33))
    )
    torch.testing.assert_close(tuple(without), tuple(given), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, same, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_gradient_sums_to_zero_and_shift_changes_nothing(backend, divergence):
    z, q, y = torch.randn(5, 100), distributions(5, 100, seed=3), distributions(5, 100, seed=4)
    z, q, y = (x.to(backend.device) for x in (z, q, y))
    options = dict(divergence=divergence, reduction="none", backend=backend.name)
    one, gradient = local_loss_and_grad(z, q, y, **options)
    other, shifted = local_loss_and_grad(z + 32.0, q, y, **options)
    assert gradient.sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-4)  # z + 32 itself rounds
    torch.testing.assert_close(gradient, shifted, rtol=1e-3, atol=1e-6)


def test_descent_certificate(backend):
    """Check that a belief of no larger loss than its prior is (1 - alpha) / alpha KL(q || p) closer to the target."""
    alpha, q = 0.4, distributions(64, 10, seed=5)
    labels = torch.randint(0, 10, (64,))
    y = 0.9 * F.one_hot(labels, 10) + 0.01
    z = (q.log() + 0.5 * torch.randn(64, 10)).requires_grad_()
    q, y, z = (x.detach().to(backend.device) for x in (q, y, z))
    options = dict(reduction="none", backend=backend.name)
    at = local_loss_and_grad(z, q, y, alpha, **options)[0]
    copied = local_loss_and_grad(q.log(), q, y, alpha, **options)[0]
    assert copied.consistency.abs().max() < 1e-5
    premise = at.loss <= copied.loss
    assert premise.any() and not premise.all()
    gain = copied.fidelity - at.fidelity  # KL(y || q) - KL(y || p)
    certified = gain >= (1 - alpha) / alpha * at.consistency - 1e-5
    assert certified[premise].all() and not certified[~premise].any()
