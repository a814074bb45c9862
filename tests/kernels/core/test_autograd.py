"""Tests of the loss in autograd: scaled, summed, repeated, through non-leaves, with only the gradient saved."""

import gc
import weakref

import pytest
import torch

from helpers.operations import make_operation
from helpers.oracle import make_case
from sid_kernels import fused_local_loss, local_loss_and_grad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def given(backend, **kinds):
    """Return the logits as a leaf, the other arguments, and the options."""
    case = make_case(6, 33, **kinds).to(backend.device)
    return case.logits.requires_grad_(), (case.prior, case.target, case.alpha), dict(case.options, backend=backend.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_both_operations_agree(backend, reduction, dtype):
    for soft in (True, False):
        z, rest, options = given(backend, soft=soft, dtype=dtype, reduction=reduction, ignored=0.2, alpha="rows")
        expected, dlogits = local_loss_and_grad(z, *rest, **options)
        result = fused_local_loss(z, *rest, **options)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        assert result.loss.requires_grad and not dlogits.requires_grad
        assert not any(x.requires_grad for x in (result.belief, result.fidelity, result.consistency))
        result.loss.backward()
        assert torch.equal(z.grad, dlogits) and z.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", (3.0, 0.0, -0.37))
def test_scaled_loss(backend, factor, dtype):
    z, rest, options = given(backend, dtype=dtype)
    dlogits = local_loss_and_grad(z, *rest, **options)[1]
    (fused_local_loss(z, *rest, **options).loss * factor).backward()
    torch.testing.assert_close(z.grad.float(), dlogits.float() * factor, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_for_each_row(backend, dtype):
    z, rest, options = given(backend, dtype=dtype, reduction="none")
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1.0], device=z.device)
    dlogits = local_loss_and_grad(z, *rest, **options)[1]
    (fused_local_loss(z, *rest, **options).loss * weights).sum().backward()
    torch.testing.assert_close(
        z.grad.float(), dlogits.float() * weights[:, None], rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    z.grad = None
    fused_local_loss(z, *rest, **options).loss.sum().backward()  # an expanded gradient of ones
    assert torch.equal(z.grad, dlogits)


def test_sum_of_several_losses(backend):
    z, rest, options = given(backend)
    first = local_loss_and_grad(z, *rest, **options)[1]
    second = local_loss_and_grad(2 * z, None, rest[1], 0.9, **options)[1]
    loss = fused_local_loss(z, *rest, **options).loss + 3 * fused_local_loss(2 * z, None, rest[1], 0.9, **options).loss
    loss.backward()
    torch.testing.assert_close(z.grad, first + 6 * second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scales", ((1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (3.0, 1.0, 0.5)))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_repeated_backward(backend, reduction, scales):
    """Check that each pass over a kept graph gives the whole gradient, and that earlier results do not change."""
    z, rest, options = given(backend, reduction=reduction)
    dlogits = local_loss_and_grad(z, *rest, **options)[1]
    loss = fused_local_loss(z, *rest, **options).loss
    kept = []
    for i, scale in enumerate(scales):
        (gradient,) = torch.autograd.grad(loss, z, torch.full_like(loss, scale), retain_graph=i + 1 < len(scales))
        kept.append(gradient)
    for gradient, scale in zip(kept, scales, strict=True):
        torch.testing.assert_close(gradient, dlogits * scale, rtol=1e-6, atol=0)


def test_repeated_backward_into_grad(backend):
    """Check that .grad is not the memory that the graph keeps, because it accumulates in place."""
    z, rest, options = given(backend)
    dlogits = local_loss_and_grad(z, *rest, **options)[1]
    loss = fused_local_loss(z, *rest, **options).loss
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(z.grad, 3 * dlogits, rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(z.grad, 4 * dlogits, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_logits_that_are_not_a_leaf(backend):
    """Check that the logits of a linear layer may enter several losses, one of them PyTorch's."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(5, 7).to(backend.device)
    x = torch.randn(4, 5, device=backend.device)
    labels = torch.tensor([0, 6, 3, 3], device=backend.device)
    layer(x).square().sum().backward()
    squares = layer.weight.grad.clone()
    layer.zero_grad()
    logits = layer(x)
    dlogits = local_loss_and_grad(logits, None, labels, backend=backend.name)[1]
    (fused_local_loss(logits, None, labels, backend=backend.name).loss + logits.square().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, dlogits.t() @ x + squares, rtol=1e-5, atol=1e-5)
    layer.zero_grad()
    logits = layer(x)
    local_loss_and_grad(logits, None, labels, backend=backend.name)
    logits.backward(dlogits)  # as the trainer does
    torch.testing.assert_close(layer.bias.grad, dlogits.sum(0))


def test_prior_target_and_alpha_are_constants(backend):
    z, (q, y, a), options = given(backend, soft=True, alpha="rows")
    q, y, a = (x.detach().requires_grad_() for x in (q, y, a))
    loss = fused_local_loss(z, q, y, a, **options).loss
    assert torch.autograd.grad(loss, (z, q, y, a), allow_unused=True, retain_graph=True)[1:] == (None, None, None)
    loss.backward()
    assert q.grad is None and y.grad is None and a.grad is None and z.grad is not None
    assert not fused_local_loss(z.detach(), q, y, a, **options).loss.requires_grad


def test_second_derivative_is_refused_by_name(backend):
    z, rest, options = given(backend)
    dlogits = local_loss_and_grad(z, *rest, **options)[1]
    loss = fused_local_loss(z, *rest, **options).loss
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(first, dlogits)
    with pytest.raises(RuntimeError, match="fused_local_loss has no second derivative"):
        first.square().sum().backward()


def test_gradient_penalty_is_never_ignored(backend):
    """Check that a second derivative raises: in a sum of losses, behind a layer, by .backward(), for some inputs."""
    layer = torch.nn.Linear(5, 7).to(backend.device)
    x = torch.randn(4, 5, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3], device=backend.device)

    def penalised():
        loss = fused_local_loss(layer(x), None, labels, backend=backend.name).loss
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + gradient.square().sum()

    for differentiate in (
        lambda total: total.backward(),
        lambda total: torch.autograd.grad(total, x),
        lambda total: torch.autograd.grad(total, layer.bias),
    ):
        total = penalised()
        with pytest.raises(RuntimeError, match="fused_local_loss has no second derivative"):
            differentiate(total)


def test_what_is_saved(backend):
    """Check what is saved: for float32, and for small float16 on a CPU, the gradient in float32 alone.

    For other half precision it is what the gradient is computed from, and in bfloat16 also that of `loss.backward()`.
    """
    for dtype in DTYPES:
        z, rest, options = given(backend, soft=True, dtype=dtype)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
            loss = fused_local_loss(z, *rest, **options).loss
        assert all(x.shape == z.shape for x in saved)
        new = [x for x in saved if x.data_ptr() not in (z.data_ptr(), rest[0].data_ptr(), rest[1].data_ptr())]
        alone = dtype is torch.float32 or (dtype is torch.float16 and z.is_cpu)
        assert len(saved) - len(new) == (0 if alone else 3)
        knows = backend.name == "cuda" or (backend.name in ("reference", "cpu") and z.is_cpu)  # without waiting
        bytes_each = 4 if alone else 2 if dtype is torch.bfloat16 and knows else 0
        assert sum(x.untyped_storage().nbytes() for x in new) == z.numel() * bytes_each
        loss.backward()


def test_without_gradients_nothing_is_kept(backend):
    z, rest, options = given(backend)
    expected = local_loss_and_grad(z, *rest, **options)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = fused_local_loss(z, *rest, **options)
            again, dlogits = local_loss_and_grad(z, *rest, **options)
        assert result.loss.grad_fn is None and not result.loss.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        assert torch.equal(again.loss, expected.loss) and dlogits.shape == z.shape
    with torch.inference_mode():
        frozen = z.detach().clone()
        local_loss_and_grad(frozen, *rest, **options, out=frozen)
    assert torch.equal(frozen, dlogits)


def test_the_graph_goes_when_it_is_let_go(backend):
    z, rest, options = given(backend)
    loss = fused_local_loss(z, *rest, **options).loss
    (saved,) = loss.grad_fn.saved_tensors
    seen = weakref.ref(saved)
    del saved, loss
    gc.collect()
    assert seen() is None, "a reference cycle keeps the gradient"


def test_gradients_are_accumulated_over_micro_batches(backend):
    z, rest, options = given(backend)
    whole = local_loss_and_grad(z, *rest, **options, reduction="sum")[1]
    for i in range(0, 6, 2):
        part = slice(i, i + 2)
        fused_local_loss(z[part], rest[0][part], rest[1][part], rest[2], **options, reduction="sum").loss.backward()
    torch.testing.assert_close(z.grad, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_the_loss_in_float32(backend, half):
    layer = torch.nn.Linear(8, 10).to(backend.device)
    x = torch.randn(4, 8, device=backend.device)
    q = torch.full((4, 10), 0.1, device=backend.device)
    labels = torch.tensor([1, 2, 3, 9], device=backend.device)
    with torch.autocast(backend.device, dtype=half):
        logits = layer(x)
        assert logits.dtype is half
        with_prior = fused_local_loss(logits, q, labels, backend=backend.name)
        without = fused_local_loss(logits, None, labels, backend=backend.name)
    assert with_prior.loss.dtype is torch.float32 and with_prior.belief.dtype is torch.float32
    assert without.belief.dtype is half
    expected = fused_local_loss(logits.detach().float(), q, labels, backend=backend.name)
    torch.testing.assert_close(with_prior.loss, expected.loss)
    with_prior.loss.backward()
    assert layer.weight.grad.dtype is torch.float32 and layer.weight.grad.isfinite().all()


CASES = [("loss", "mean"), ("loss", "none"), ("head", "mean"), ("head", "none"), ("cascade", "mean")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_saved_tensors_are_unpacked_once(name, reduction, dtype):
    """Count unpackings: offload hooks pay for each one, and non-reentrant checkpointing refuses a second one."""
    fused, _, inputs = make_operation(name)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    counts = {}

    def pack(x):
        counts[len(counts)] = 0
        return len(counts) - 1, x

    def unpack(packed):
        counts[packed[0]] += 1
        return packed[1]

    options = {} if name == "cascade" else {"reduction": reduction}
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = fused(*inputs, **options)
    loss.sum().backward()
    assert counts and set(counts.values()) == {1}, counts


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_checkpointing_that_is_not_reentrant(name, reduction):
    fused, _, inputs = make_operation(name)
    options = {} if name == "cascade" else {"reduction": reduction}
    leaves = [x.clone().requires_grad_() for x in inputs]

    def form(*x):
        return fused(*(v * 2 for v in x), **options).sum()

    expected = torch.autograd.grad(form(*leaves), leaves)
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(form, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_hooks_may_change_the_gradient_of_a_kept_graph(name, reduction, factor, dtype):
    fused, _, inputs = make_operation(name)
    options = {} if name == "cascade" else {"reduction": reduction}
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    between = [x * 1 for x in leaves]
    loss = fused(*between, **options).sum() * factor
    expected = torch.autograd.grad(loss, between, retain_graph=True)
    expected = [x.clone() for x in expected]
    for x in between:
        x.register_hook(lambda gradient: gradient.mul_(0.0))
    assert not any(x.any() for x in torch.autograd.grad(loss, leaves, retain_graph=True))
    again = torch.autograd.grad(loss, between, retain_graph=True)
    assert not any(x.any() for x in again)  # hooks run here, too
    for x in between:
        x._backward_hooks.clear()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, between), expected, strict=True))
