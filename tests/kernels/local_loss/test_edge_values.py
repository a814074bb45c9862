"""Tests of edge values: masked classes, NaN, infinities, huge logits, underflow, ignored rows, empty batches."""

import math

import pytest
import torch

from helpers.grids import DTYPES
from helpers.local_loss import assert_same, run
from helpers.oracle import Case, assert_within_budget, make_case
from sid_kernels import fused_local_loss, local_loss_and_grad

INF, NAN = math.inf, math.nan
DIVERGENCES = ("forward", "reverse")
SIZES = (5, 16, 40, 1030)  # in one vector, a full one, in one block, in two


def soft_case(classes, divergence, rows=3, **more):
    return make_case(rows, classes, soft=True, divergence=divergence, reduction="none", **more)


def rows_of(result, dlogits):
    return (*result, dlogits)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", SIZES)
def test_masked_class_without_mass_counts_nothing(backend, classes, divergence):
    """Check that a masked class gets 0, and that the other classes get what they get without it."""
    case = soft_case(classes, divergence)
    masked = torch.arange(classes) % 4 == 1
    small = Case(case.logits[:, ~masked], case.prior[:, ~masked], case.target[:, ~masked], 0.5, case.options)
    case.logits[:, masked] = -INF
    case.prior[:, masked] = 0.0
    case.target[:, masked] = 0.0
    result, dlogits = run(case, backend)
    assert result.loss.isfinite().all() and dlogits.isfinite().all()
    assert (dlogits[:, masked] == 0).all() and (result.belief[:, masked] == 0).all()
    expected, gradient = run(small, backend)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(dlogits[:, ~masked], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ("prior", "target", "label", "smoothing", "no prior"))
def test_masked_class_with_mass_makes_the_loss_infinite(backend, where, dtype):
    case = make_case(4, 21, dtype=dtype, soft=where != "label", reduction="none", prior=where != "no prior")
    case.logits[1, 3] = -INF
    if where == "label":
        case.target[:] = torch.tensor([0, 3, 3, 20])
        case.prior[1, 3] = 0.0
    if where == "prior":
        case.target[1, 3] = 0.0
    if where == "target":
        case.prior[1, 3] = 0.0
    if where == "smoothing":
        case.prior[1, 3] = case.target[1, 3] = 0.0
        case.options["label_smoothing"] = 0.1
    result, dlogits = run(case, backend)
    assert result.loss.tolist()[1] == INF and result.loss[[0, 2, 3]].isfinite().all()
    assert dlogits.isfinite().all(), "the gradient is the closed form's, finite"


@pytest.mark.parametrize("alpha,infinite", ((1.0, "consistency"), (0.0, "fidelity")))
def test_infinite_part_of_no_weight_leaves_the_loss_finite(backend, alpha, infinite):
    case = make_case(2, 8, soft=True, alpha=alpha)
    case.logits[:, 2] = -INF
    (case.target if alpha == 1.0 else case.prior)[:, 2] = 0.0
    result, _ = run(case, backend)
    assert getattr(result, infinite).item() == INF and result.loss.isfinite()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("bad", (NAN, INF, "all masked"))
def test_bad_row_stays_alone(backend, bad, classes, divergence):
    """Check that logits with a NaN, a +inf or only -inf affect their own row and no other."""
    clean = soft_case(classes, divergence, rows=5)
    before = [x.clone() for x in rows_of(*run(clean, backend))]
    clean.logits[2, classes // 2] = 0.0 if bad == "all masked" else bad
    if bad == "all masked":
        clean.logits[2] = -INF
    on = clean.to(backend.device)
    after = local_loss_and_grad(on.logits, on.prior, on.target, on.alpha, backend=backend.name, **on.options)
    others = [0, 1, 3, 4]
    for old, new in zip(before, rows_of(*after), strict=True):
        assert torch.equal(old[others], new[others])
    for name in ("loss", "belief"):
        assert getattr(after[0], name)[2].isnan().any(), name
    assert after[1][2].isnan().any()


@pytest.mark.parametrize("where", ("prior", "soft target"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_in_prior_or_target_stays_in_its_row(backend, divergence, where):
    case = soft_case(19, divergence)
    (case.prior if where == "prior" else case.target)[1, 4] = NAN
    on = case.to(backend.device)
    result, dlogits = local_loss_and_grad(on.logits, on.prior, on.target, backend=backend.name, **on.options)
    assert result.loss.isnan().tolist() == [False, True, False]
    assert dlogits.isnan().any(-1).tolist() == [False, True, False]
    assert result.belief.isfinite().all(), "the belief knows neither prior nor target"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", (1e4, 1e30))
@pytest.mark.parametrize("classes", SIZES)
def test_huge_logits_do_not_overflow(backend, classes, scale, divergence):
    result, dlogits = run(soft_case(classes, divergence, scale=scale), backend)
    assert result.loss.isfinite().all() and dlogits.isfinite().all() and result.belief.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_times_log_zero(backend, divergence):
    case = soft_case(12, divergence)
    case.prior[:, ::2] = 0.0
    case.target[:, 1::2] = 0.0
    result, dlogits = run(case, backend)
    assert result.loss.isfinite().all() and dlogits.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_underflowed_half_prior_in_reverse_is_large_not_infinite(backend, dtype):
    """Check that logarithms end at float32's smallest normal number, whose -log is 87.3."""
    case = soft_case(10, "reverse", dtype=dtype, scale=0.0, alpha=0.0)
    case.prior = (torch.arange(10) * -100.0).softmax(-1).to(dtype).expand(3, 10).contiguous()
    assert (case.prior[:, 1:] == 0).sum() >= 27
    result, _ = run(case, backend)
    assert result.loss.isfinite().all() and (result.loss > 70).all() and (result.loss < 88).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_ignored_rows(backend, reduction, dtype):
    """Check that ignored rows have loss and gradient 0 and a belief, and that the mean is over the other rows."""
    for classes in SIZES:
        case = make_case(6, classes, dtype=dtype, reduction=reduction, ignore_index=-7)
        case.target[[1, 4]] = -7
        result, dlogits = run(case, backend)
        assert (dlogits[[1, 4]] == 0).all() and (result.belief[[1, 4]] > 0).any()
        kept = [0, 2, 3, 5]
        only = Case(case.logits[kept], case.prior[kept], case.target[kept], 0.5, case.options)
        expected, gradient = run(only, backend)
        assert_same((dlogits[kept],), (gradient,), backend)
        torch.testing.assert_close(result.loss[kept] if reduction == "none" else result.loss, expected.loss)
        case.logits[1] = NAN
        case.logits[4] = -INF
        on = case.to(backend.device)
        after, after_grad = local_loss_and_grad(on.logits, on.prior, on.target, backend=backend.name, **on.options)
        assert torch.equal(after.loss, result.loss) and torch.equal(after_grad, dlogits)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_all_rows_ignored_give_zero(backend, reduction):
    case = make_case(5, 7, reduction=reduction, ignored=1.0)
    result, dlogits = run(case, backend)
    assert not result.loss.any() and not result.fidelity.any() and not result.consistency.any() and not dlogits.any()
    torch.testing.assert_close(result.belief.cpu(), case.logits.softmax(-1))


def test_ignore_index_may_be_a_class(backend):
    case = make_case(6, 4, ignore_index=2, reduction="none")
    case.target[:] = torch.tensor([0, 1, 2, 3, 2, 0])
    result, _ = run(case, backend)
    assert (result.loss == 0).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("soft", (True, False))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_rows(backend, reduction, divergence, soft):
    case = make_case(0, 10, soft=soft, divergence=divergence, reduction=reduction, label_smoothing=0.1)
    result, dlogits = run(case, backend)
    assert result.loss.shape == ((0,) if reduction == "none" else ()) and not result.loss.any()
    assert dlogits.shape == result.belief.shape == (0, 10)
    z = torch.zeros(0, 10, device=backend.device, requires_grad=True)
    on = case.to(backend.device)
    fused_local_loss(z, on.prior, on.target, backend=backend.name, **on.options).loss.sum().backward()
    assert z.grad.shape == (0, 10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_class(backend, divergence):
    for reduction in ("none", "mean", "sum"):
        case = make_case(4, 1, divergence=divergence, reduction=reduction, label_smoothing=0.1)
        result, dlogits = run(case, backend)
        assert (result.belief == 1).all() and (dlogits == 0).all()
        assert result.loss.abs().max() < 1e-6


def test_masses_other_than_one(backend):
    """Check that targets and priors that do not sum to 1 keep sum y and sum q in loss and gradient."""
    for dtype in DTYPES:
        case = make_case(5, 30, dtype=dtype, soft=True, label_smoothing=0.1)
        case.prior, case.target = case.prior * 1.5, case.target * 0.25
        run(case, backend)


def test_truth_itself_on_a_case_by_hand():
    """Check a case computed by hand: z = (0, log 3), p = (1/4, 3/4), y = class 1, q = (1/2, 1/2), alpha = 1/2."""
    z, q = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.5, 0.5]])
    case = Case(z, q, torch.tensor([1]))
    result, dlogits = local_loss_and_grad(z, q, case.target, 0.5)
    fidelity, consistency = math.log(4 / 3), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(result.fidelity, torch.tensor(fidelity))
    torch.testing.assert_close(result.consistency, torch.tensor(consistency))
    torch.testing.assert_close(result.loss, torch.tensor((fidelity + consistency) / 2))
    torch.testing.assert_close(dlogits, torch.tensor([[0.0, 0.0]]), atol=1e-7, rtol=0)  # (1/4 - 1/4, 3/4 - 3/4)
    assert_within_budget(result, dlogits, case)


@pytest.mark.parametrize("masked", (slice(0, 2048), slice(2048, 4096)), ids=("first", "last"))
def test_reverse_with_logits_masked_by_the_least_float(backend, masked):
    """Check that finfo.min instead of -inf gives no NaN, although the step to the next block's maximum overflows."""
    case = make_case(3, 4096, divergence="reverse", label_smoothing=0.1)
    case.logits[:, masked] = torch.finfo(torch.float32).min
    case.target %= 2048
    on = case.to(backend.device)
    result, dlogits = local_loss_and_grad(on.logits, on.prior, on.target, backend=backend.name, **on.options)
    assert result.loss.isfinite() and dlogits.isfinite().all() and result.belief.isfinite().all()
