"""Tests of layouts in memory: shapes, strides, dtypes of labels, `out`, and that nothing else is written."""

import pytest
import torch

from helpers.grids import DTYPES
from helpers.local_loss import assert_same, run
from helpers.oracle import Case, assert_within_budget, make_case
from sid_kernels import fused_local_loss, local_loss_and_grad

DIVERGENCES = ("forward", "reverse")


def soft_case(rows=6, classes=37, divergence="forward", **more):
    return make_case(rows, classes, soft=True, divergence=divergence, alpha="rows", **more)


def padded(x, extra=5):
    """Return the same values in rows that are further apart and not aligned to a vector."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), torch.nan, dtype=x.dtype)
    wide[:, 3 : 3 + x.shape[1]] = x
    return wide[:, 3 : 3 + x.shape[1]]


LAYOUTS = {
    "padded": padded,
    "every other row": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), 2).flatten(1, 2)[:, ::2],
}


def on_device(x, device):
    """Return x.to(device) with the strides of x."""
    if not isinstance(x, torch.Tensor) or x.device.type == device:
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (elements,))
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def call(case, backend, **more):
    z, q, y, a = (on_device(x, backend.device) for x in (case.logits, case.prior, case.target, case.alpha))
    return local_loss_and_grad(z, q, y, a, backend=backend.name, **case.options, **more)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same(backend, layout, dtype, divergence):
    case = soft_case(divergence=divergence, dtype=dtype)
    expected, gradient = run(case, backend)
    change = LAYOUTS[layout]
    strided = Case(change(case.logits), change(case.prior), change(case.target), case.alpha, case.options)
    assert not strided.logits.is_contiguous()
    result, dlogits = call(strided, backend)
    assert_same((*result, dlogits), (*expected, gradient), backend)
    assert all(x.is_contiguous() for x in (*result, dlogits))


def test_one_row_for_all(backend):
    """Expand prior, target or logits, with a row stride of 0."""
    case = soft_case()
    one = Case(case.logits, case.prior[:1].expand(6, -1), case.target[:1].expand(6, -1), 0.3, case.options)
    result, dlogits = call(one, backend)
    assert_within_budget(result, dlogits, one)
    one.logits = case.logits[:1].expand(6, -1)
    result, dlogits = call(one, backend)
    assert_within_budget(result, dlogits, one)
    assert (dlogits == dlogits[0]).all()


@pytest.mark.parametrize("soft", (True, False))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("shape", ((), (4,), (2, 3), (2, 3, 2), (2, 0, 3)))
def test_any_number_of_dimensions(backend, shape, reduction, soft):
    rows = torch.Size(shape).numel()
    case = make_case(rows, 11, soft=soft, alpha="rows", reduction=reduction)
    flat = case.to(backend.device)
    options = dict(backend=backend.name, **case.options)
    expected, gradient = local_loss_and_grad(flat.logits, flat.prior, flat.target, flat.alpha, **options)
    z, q = flat.logits.view(*shape, 11), flat.prior.view(*shape, 11)
    y = flat.target.view(*shape, 11) if soft else flat.target.view(shape)
    result, dlogits = local_loss_and_grad(z, q, y, flat.alpha.view(shape), **options)
    assert result.belief.shape == dlogits.shape == z.shape
    assert result.loss.shape == result.fidelity.shape == (torch.Size(shape) if reduction == "none" else ())
    assert torch.equal(result.loss.flatten(), expected.loss.flatten())
    assert torch.equal(result.belief.flatten(), expected.belief.flatten())
    assert torch.equal(dlogits.flatten(), gradient.flatten())
    leaf = z.clone().requires_grad_()
    fused_local_loss(leaf, q, y, flat.alpha.view(shape), **options).loss.sum().backward()
    assert leaf.grad.shape == z.shape and torch.equal(leaf.grad, dlogits)


def test_dimensions_out_of_order(backend):
    """Check that permuted logits (2, 3, C), as from a segmentation head, are copied once and give the right values."""
    z = torch.randn(2, 9, 3, device=backend.device).permute(0, 2, 1)
    labels = torch.randint(0, 9, (3, 2), device=backend.device).t()
    result, dlogits = local_loss_and_grad(z, None, labels, backend=backend.name)
    expected, gradient = local_loss_and_grad(
        z.reshape(6, 9).contiguous(), None, labels.reshape(6), backend=backend.name
    )
    assert torch.equal(result.loss, expected.loss) and torch.equal(dlogits, gradient.view(2, 3, 9))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8), ids=str)
def test_label_dtypes(backend, dtype):
    case = make_case(8, 5)
    expected, gradient = run(case, backend)
    case.target = case.target.to(dtype).repeat_interleave(2)[::2]  # neither int64 nor contiguous
    result, dlogits = call(case, backend)
    assert torch.equal(result.loss, expected.loss) and torch.equal(dlogits, gradient)


@pytest.mark.parametrize("logits", DTYPES, ids=str)
@pytest.mark.parametrize("prior", (*DTYPES, None), ids=str)
def test_result_dtypes(backend, logits, prior):
    case = make_case(3, 6, dtype=logits, prior_dtype=prior, prior=prior is not None)
    result, dlogits = run(case, backend)
    assert result.belief.dtype == (prior or logits) and dlogits.dtype == logits
    assert {x.dtype for x in (result.loss, result.fidelity, result.consistency)} == {torch.float32}


@pytest.mark.parametrize("alpha", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_alpha_and_soft_target_of_another_dtype(backend, alpha):
    case = soft_case()
    case.target, case.alpha = case.target.to(alpha), torch.full((6,), 0.25, dtype=alpha)
    result, dlogits = call(case, backend)
    case.target = case.target.float()
    assert_within_budget(result, dlogits, case)


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (7, 16, 37, 1030))
def test_out(backend, classes, dtype, divergence):
    """Check that new memory, padded memory and the logits themselves get the same gradient, and padding is kept."""
    for soft in (True, False):
        case = make_case(
            5, classes, dtype=dtype, soft=soft, ignored=0.2, label_smoothing=0.1, divergence=divergence
        ).to(backend.device)
        expected, gradient = call(case, backend)
        fresh = torch.full_like(case.logits, torch.nan)
        wide = torch.full((5, classes + 9), 7.0, dtype=dtype, device=backend.device)
        for out in (fresh, wide[:, 4 : 4 + classes], case.logits):
            result, dlogits = call(case, backend, out=out)
            assert dlogits is out
            assert_same((*result, out), (*expected, gradient), backend)
        assert (wide[:, :4] == 7).all() and (wide[:, 4 + classes :] == 7).all()


def test_out_is_the_padded_logits(backend):
    case = soft_case().to(backend.device)
    expected, gradient = call(case, backend)
    wide = torch.full((6, 50), 7.0, device=backend.device)
    case.logits = wide[:, 5:42].copy_(case.logits)
    _, dlogits = call(case, backend, out=case.logits)
    assert_same((dlogits,), (gradient,), backend)
    assert (wide[:, :5] == 7).all() and (wide[:, 42:] == 7).all()


def test_out_of_more_dimensions(backend):
    z = torch.randn(2, 3, 8, device=backend.device)
    labels = torch.randint(0, 8, (2, 3), device=backend.device)
    expected = local_loss_and_grad(z, None, labels, backend=backend.name)[1]
    out = torch.empty_like(z)
    assert local_loss_and_grad(z, None, labels, backend=backend.name, out=out)[1] is out and torch.equal(out, expected)
    local_loss_and_grad(z, None, labels, backend=backend.name, out=z)
    assert torch.equal(z, expected)


def test_overwritten_logits_cannot_corrupt_another_gradient(backend):
    """Check that a backward pass that saved the logits raises after out=logits has changed them in place."""
    z = torch.randn(3, 8, device=backend.device, requires_grad=True)
    logits = z.exp()  # exp saves its result
    labels = torch.tensor([0, 1, 2], device=backend.device)
    _, dlogits = local_loss_and_grad(logits, None, labels, backend=backend.name, out=logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.backward(torch.ones_like(dlogits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_the_callers_is_written(backend, dtype):
    for soft, divergence in ((True, "forward"), (True, "reverse"), (False, "forward")):
        case = make_case(5, 1030, dtype=dtype, soft=soft, divergence=divergence, alpha="rows").to(backend.device)
        inputs = (case.logits, case.prior, case.target, case.alpha)
        before = [x.clone() for x in inputs]
        call(case, backend)
        leaf = case.logits.requires_grad_()
        fused_local_loss(leaf, *inputs[1:], backend=backend.name, **case.options).loss.backward()
        for x, copy in zip(inputs, before, strict=True):
            assert torch.equal(x.detach().view(torch.uint8), copy.view(torch.uint8))
