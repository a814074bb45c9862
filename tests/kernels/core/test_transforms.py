"""Tests of the operations under torch.func transforms and in forward mode: the right derivative, or an error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from helpers.operations import NAMES, make_operation, plain_loss
from sid_kernels import BeliefHead, fused_local_loss


@pytest.fixture(params=NAMES)
def operation(request):
    return make_operation(request.param)


def close(actual, expected):
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def every(operation):
    return tuple(range(len(operation.inputs)))


def test_grad_and_vjp(operation):
    close(*(grad(f, every(operation))(*operation.inputs) for f in operation[:2]))
    close(*(vjp(f, *operation.inputs)[1](torch.tensor(0.37)) for f in operation[:2]))


def test_jvp_and_dual_numbers(operation):
    """Check forward mode, which used to give a tangent of zero."""
    tangents = tuple(x.roll(1, 0) for x in operation.inputs)
    expected = jvp(operation.plain, operation.inputs, tangents)
    close(jvp(operation.fused, operation.inputs, tangents), expected)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(operation.inputs, tangents, strict=True))
        close(tuple(forward_ad.unpack_dual(operation.fused(*duals))), expected)


def test_jacobians(operation):
    for transform in (jacfwd, jacrev):
        close(*(transform(f)(*operation.inputs) for f in operation[:2]))


def test_vmap_and_gradients_of_samples(operation):
    first = torch.stack([operation.inputs[0], operation.inputs[0].roll(1, 0), -operation.inputs[0]])
    dims = (0, *[None] * (len(operation.inputs) - 1))
    close(*(vmap(f, in_dims=dims)(first, *operation.inputs[1:]) for f in operation[:2]))
    close(*(vmap(grad(f), in_dims=dims)(first, *operation.inputs[1:]) for f in operation[:2]))
    close(*(vmap(f, in_dims=(1, *dims[1:]))(first.movedim(0, 1), *operation.inputs[1:]) for f in operation[:2]))


def test_functionalize(operation):
    close(functionalize(operation.fused)(*operation.inputs), operation.plain(*operation.inputs))
    expected = grad(operation.plain)(*operation.inputs)
    close(functionalize(grad(operation.fused))(*operation.inputs), expected)
    close(grad(functionalize(operation.fused))(*operation.inputs), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_every_argument_may_have_a_sample_dimension(reduction, soft):
    draw = torch.Generator().manual_seed(0)
    z, q = (torch.randn(3, 4, 5, generator=draw) for _ in range(2))
    q, y, alpha = q.softmax(-1), torch.randint(0, 5, (3, 4), generator=draw), torch.rand(3, 4, generator=draw)
    y[0, :3] = -100
    y = torch.randn(3, 4, 5, generator=draw).softmax(-1) if soft else y

    def form(*x):
        return fused_local_loss(*x, reduction=reduction).loss

    for dims in ((0, 0, 0, 0), (0, None, 0, None), (None, 0, None, 0), (0, 0, None, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip((z, q, y, alpha), dims, strict=True)]
        one = [[x if dim is None else x[i] for x, dim in zip(given, dims, strict=True)] for i in range(3)]
        close(vmap(form, in_dims=dims)(*given), torch.stack([form(*x) for x in one]))
        single = torch.stack([grad(lambda *x: form(*x).sum())(*x) for x in one])
        close(vmap(grad(lambda *x: form(*x).sum()), in_dims=dims)(*given), single)
    scalar = torch.rand(3, generator=draw)
    actual = vmap(form, in_dims=(0, 0, 0, 0))(z, q, y, scalar)
    close(actual, torch.stack([form(*x) for x in zip(z, q, y, scalar, strict=True)]))


def test_half_precision_is_rounded_once():
    operation = make_operation("loss")
    z = operation.inputs[0].bfloat16()
    actual = grad(lambda z: 0.37 * operation.fused(z))(z)
    assert torch.equal(actual, grad(lambda z: 0.37 * operation.plain(z))(z.float()).bfloat16())


def test_functional_call_of_a_module():
    layer, head = torch.nn.Linear(6, 5), BeliefHead(6, 5)
    draw = torch.Generator().manual_seed(0)
    x, target = torch.randn(4, 6, generator=draw), torch.tensor([0, 4, 2, 2])
    prior = torch.randn(4, 5, generator=draw).softmax(1)
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    expected = grad(lambda p: plain_loss(functional_call(layer, p, (x,)), prior, target))(parameters)
    actual = grad(lambda p: fused_local_loss(functional_call(layer, p, (x,)), prior, target, 0.3).loss)(parameters)
    of_head = grad(lambda p: functional_call(head, p, (x, prior, target, 0.3)).loss)(parameters)
    for name in parameters:
        close((actual[name], of_head[name]), (expected[name], expected[name]))


def test_second_derivatives_are_refused(operation):
    first = grad(operation.fused)

    def summed(*x):
        return first(*x).sum()

    tangents = tuple(torch.ones_like(x) for x in operation.inputs)
    for ask in (
        lambda: grad(summed)(*operation.inputs),
        lambda: hessian(operation.fused)(*operation.inputs),
        lambda: jvp(first, operation.inputs, tangents),
        lambda: grad(lambda *x: jvp(operation.fused, x, tangents)[1])(*operation.inputs),
        lambda: functionalize(grad(summed))(*operation.inputs),
        lambda: summed(*(x.clone().requires_grad_() for x in operation.inputs)).backward(),
    ):
        with pytest.raises(RuntimeError, match="fused_local_loss has no second derivative"):
            ask()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_batch_of_incoming_gradients(name, reduction, dtype):
    """Check `is_grads_batched`, which used to fail in aten::item."""
    if (name, reduction) == ("cascade", "none"):
        return
    fused, _, inputs = make_operation(name)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    loss = fused(*inputs, reduction=reduction) if reduction == "none" else fused(*inputs)
    incoming = torch.linspace(-2, 2, 3 * loss.numel()).view(3, *loss.shape)
    actual = torch.autograd.grad(loss, inputs, incoming, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(loss, inputs, x, retain_graph=True) for x in incoming]
    atol = 1e-6 if dtype is torch.float32 else 0.01
    for x, expected in zip(actual, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(expected), rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_vectorized_jacobian():
    operation = make_operation("loss")

    def losses(z):
        return operation.fused(z, reduction="none")

    expected = torch.autograd.functional.jacobian(losses, operation.inputs[0])
    for strategy in ("reverse-mode", "forward-mode"):
        actual = torch.autograd.functional.jacobian(losses, operation.inputs[0], vectorize=True, strategy=strategy)
        close(actual, expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(operation.fused, operation.inputs[0], vectorize=True)
