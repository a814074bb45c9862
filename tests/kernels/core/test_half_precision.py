"""Tests of gradients in half precision: the incoming gradient multiplies them before they are rounded, once.

The measure is PyTorch's: the same loss under autocast, from float32 sums, with the loss scale in the incoming gradient.
"""

import pytest
import torch
import torch.nn.functional as F

from sid_kernels import CascadeWeights, fused_belief_head, fused_local_loss, refine_cascade

ALPHA, SCALE = 0.3, 65536.0


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def make_logits(rows, classes, dtype):
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, classes, generator=generator).to(dtype)
    q = torch.randn(rows, classes, generator=generator).softmax(1)
    return z, q, torch.randint(0, classes, (rows,), generator=generator)


def plain_loss(z, q, target, reduction="mean"):
    """Compute the loss with PyTorch's operators, which need no more than their first derivative here."""
    log_p = z.float().log_softmax(1) if z.dtype is not torch.float64 else z.log_softmax(1)
    q = q.to(log_p.dtype)
    loss = ALPHA * F.nll_loss(log_p, target, reduction="none") - (1 - ALPHA) * (q * log_p).sum(1)
    return loss if reduction == "none" else loss.mean()


def gradient(loss, inputs, incoming):
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, incoming))


@pytest.mark.parametrize("shape", [(8192, 4096), pytest.param((32768, 1024), marks=pytest.mark.slow)], ids=str)
def test_float16_gradient_survives_the_mean(shape):
    """Check that errors with a loss scale are at most 1.5 times PyTorch's; they were 9.6% and 30%."""
    z, q, target = make_logits(*shape, torch.float16)
    leaf = z.clone().requires_grad_()
    (actual,) = gradient(fused_local_loss(leaf, q, target, ALPHA).loss, (leaf,), SCALE)
    (plain,) = gradient(plain_loss(leaf, q, target), (leaf,), SCALE)
    exact = z.double().softmax(1).sub_(q, alpha=1 - ALPHA)
    exact[torch.arange(len(target)), target] -= ALPHA
    exact *= SCALE / len(target)
    error, allowed = relative_error(actual, exact), relative_error(plain, exact)
    assert actual.dtype is torch.float16 and error <= 1.5 * allowed, (error, allowed)


def _assert_one_rounding(actual, exact, dtype):
    """Raise unless every element is the exact one rounded once, after the errors of float32."""
    assert actual.dtype is dtype
    least = torch.finfo(dtype).smallest_normal
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp(min=least).log2().floor()
    allowed = 0.5 * unit + 2**-20 * exact.abs().max()
    assert bool(((actual.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("keep", [False, True], ids=["once", "kept"])
def test_incoming_factor_is_rounded_once(backend, dtype, reduction, keep):
    z, q, target = (x.to(backend.device) for x in make_logits(33, 70, dtype))
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = fused_local_loss(leaf, q, target, ALPHA, reduction=reduction, backend=backend.name).loss
    truth = plain_loss(exact, q, target, "none")
    truth = truth if reduction == "none" else truth.mean() if reduction == "mean" else truth.sum()
    incoming = torch.full_like(loss, 0.37)
    if reduction == "none":
        incoming = torch.linspace(-3, 3, len(loss), device=loss.device)
    (actual,) = torch.autograd.grad(loss, leaf, incoming, retain_graph=keep)
    (expected,) = torch.autograd.grad(truth, exact, incoming.double())
    _assert_one_rounding(actual, expected, dtype)
    if keep:
        (again,) = torch.autograd.grad(loss, leaf, incoming)
        assert torch.equal(actual, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_incoming_factor_is_rounded_once_when_compiled(dtype):
    z, q, target = make_logits(33, 70, dtype)
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    form = torch.compile(lambda z: 0.37 * fused_local_loss(z, q, target, ALPHA).loss, fullgraph=True)
    form(leaf).backward()
    (0.37 * plain_loss(exact, q, target)).backward()
    _assert_one_rounding(leaf.grad, exact.grad, dtype)


class RoundedLinear(torch.autograd.Function):
    """nn.Linear as a GPU computes it in half precision: sums in float32, every result rounded."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        return torch.addmm(bias.float(), hidden.float(), weight.float().t()).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        g = grad.float()
        return (g @ weight.float()).to(grad.dtype), (g.t() @ hidden.float()).to(grad.dtype), g.sum(0).to(grad.dtype)


@pytest.mark.parametrize(
    ("rows", "classes", "reduction"),
    [
        pytest.param(2048, 50257, "mean", marks=pytest.mark.slow),
        (300, 10, "mean"),
        (300, 10, "none"),
        (64, 5000, "none"),
    ],
)
def test_float16_gradients_of_a_head(rows, classes, reduction):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, 64), torch.randn(classes, 64) / 8, torch.randn(classes) / 8
    inputs = [x.half().requires_grad_() for x in (hidden, weight, bias)]
    target = torch.randint(0, classes, (rows,))
    incoming = SCALE if reduction == "mean" else SCALE / rows

    loss = fused_belief_head(*inputs, None, target, ALPHA, reduction=reduction, return_belief=False).loss
    actual = gradient(loss, inputs, incoming)
    uniform = torch.full((1, classes), 1 / classes)
    plain = gradient(plain_loss(RoundedLinear.apply(*inputs), uniform, target), inputs, SCALE)
    exact = [x.detach().double() for x in inputs]
    dlogits = torch.addmm(exact[2], exact[0], exact[1].t()).softmax(1).sub_((1 - ALPHA) / classes)
    dlogits[torch.arange(rows), target] -= ALPHA
    dlogits *= SCALE / rows
    truth = (dlogits @ exact[1], dlogits.t() @ exact[0], dlogits.sum(0))
    for name, a, b, expected in zip(("hidden", "weight", "bias"), actual, plain, truth, strict=True):
        error, allowed = relative_error(a, expected), relative_error(b, expected)
        assert error <= 1.5 * allowed, (name, error, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_cascade(dtype):
    """Check that gradients under a loss scale are as near to float64 as those without the mean."""
    torch.manual_seed(0)
    stages, rows, classes, hidden_dim, features_dim = 3, 4096, 100, 16, 8
    shapes = ((stages, hidden_dim, classes + features_dim), (stages, hidden_dim), (stages, classes, hidden_dim))
    values = [torch.randn(shape) / 4 for shape in (*shapes, (stages, classes))]
    features, target = torch.randn(rows, features_dim), torch.randint(0, classes, (rows,))

    def gradients(dtype, incoming, **options):
        inputs = [x.to(dtype).requires_grad_() for x in (features, *values)]
        loss = refine_cascade(inputs[0], CascadeWeights(*inputs[1:]), target, ALPHA, **options).loss
        return gradient(loss, inputs, incoming)

    exact_inputs = [x.to(dtype).double() for x in (features, *values)]
    leaves = [x.requires_grad_() for x in exact_inputs]
    loss = refine_cascade(leaves[0], CascadeWeights(*leaves[1:]), target, ALPHA).loss
    truth = gradient(loss, leaves, SCALE)
    actual = gradients(dtype, SCALE)
    for x, expected in zip(actual, truth, strict=True):
        assert x.dtype is dtype and relative_error(x, expected) <= 6 * torch.finfo(dtype).eps, relative_error(
            x, expected
        )
