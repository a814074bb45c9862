"""Test the Triton backend under Triton's interpreter, on the CPU, against the error budgets of oracle.py.

pytest does not collect this file by itself: test_triton_interpreter.py runs it in a fresh process, because
TRITON_INTERPRET must be set before triton is first imported. By hand: TRITON_INTERPRET=1 pytest
tests/compiled/triton/triton_cases.py
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.grids import DTYPES, INTERPRETED_DTYPES, KINDS, TARGETS
from helpers.oracle import Case, assert_within_budget, make_case, oracle
from sid_kernels import fused_local_loss, local_loss_and_grad
from sid_kernels.core import triton as core_triton
from sid_kernels.core.options import LossOptions
from sid_kernels.core.triton import INTERPRETING
from sid_kernels.local_loss import triton_launch as triton_kernels
from sid_kernels.local_loss.problem import make_problem
from sid_kernels.local_loss.triton_launch import LossPlan

assert INTERPRETING, "run through test_triton_interpreter.py"
# numpy warns about what the kernels intend: log 0, 0 * inf, -inf - -inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LOOP = (LossPlan(2**62, 1, 16, 1, (64, 64, 64), looped=True),)  # three chunks of 16 at C = 37, the last one partial


@pytest.fixture(params=("tile", "loop"))
def plans(request, monkeypatch):
    """Run both kernels at small C: whole rows on chip, and chunks."""
    if request.param == "loop":
        monkeypatch.setattr(triton_kernels, "PLANS", LOOP)
    return request.param


def run(case: Case, out=None, need_grad=True):
    """Run the backend itself, without the value checks that public operations make on the CPU."""
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    problem = make_problem(
        case.logits, case.prior, case.target, case.alpha, LossOptions(**o), out=out, need_grad=need_grad
    )
    return triton_kernels.run(problem)


def check(case: Case, **options):
    result = run(case, **options)
    assert_within_budget(result, result.dlogits, case)
    return result


PRIORS = ("same", "none", "other")


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("divergence,target", KINDS)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_every_kind(plans, dtype, divergence, target, prior):
    prior_dtype = DTYPES[(DTYPES.index(dtype) + (prior == "other")) % 3]
    for alpha, reduction in ((0.3, "mean"), ("scalar", "sum"), ("rows", "none")):
        case = make_case(
            3, 37, dtype=dtype, prior=prior != "none", prior_dtype=prior_dtype, alpha=alpha, seed=1,
            divergence=divergence, reduction=reduction, **TARGETS[target],
        )  # fmt: skip
        check(case)


@pytest.mark.parametrize("plan", triton_kernels.PLANS, ids=str)
@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_every_plan_at_its_own_size(plan, divergence):
    """Run sizes that pick each plan of the table, with more rows than one program takes."""
    classes = min(plan.classes, 40003) - 3
    assert triton_kernels.plan_for(classes) == plan
    rows = plan.rows + 2
    check(make_case(rows, classes, divergence=divergence, label_smoothing=0.1, ignored=0.2))
    check(make_case(rows, classes, divergence=divergence, soft=True, prior=False))


@pytest.mark.parametrize("rows,classes", [(1, 1), (3, 1), (1, 2), (2, 16), (2, 17), (1, 129)])
def test_odd_sizes(plans, rows, classes):
    for divergence in ("forward", "reverse"):
        check(make_case(rows, classes, divergence=divergence, label_smoothing=0.1))
        check(make_case(rows, classes, divergence=divergence, soft=True))


@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 3), classes=st.integers(1, 70), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), prior_dtype=st.sampled_from(DTYPES), prior=st.booleans(), soft=st.booleans(),
    alpha=st.sampled_from([0.0, 1.0, 0.37, "rows", "scalar"]),
    divergence=st.sampled_from(["forward", "reverse"]), label_smoothing=st.sampled_from([0.0, 0.05, 1.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]), scale=st.sampled_from([0.0, 1.0, 20.0]),
)  # fmt: skip
def test_drawn_cases(plans, divergence, soft, label_smoothing, **kinds):
    if divergence == "reverse" and not soft and label_smoothing == 0.0:
        label_smoothing = 0.1
    check(make_case(divergence=divergence, soft=soft, label_smoothing=label_smoothing, ignored=0.2, **kinds))


def test_no_rows(plans):
    for reduction, shape in (("mean", ()), ("none", (0,))):
        result = run(make_case(0, 10, reduction=reduction))
        assert result.loss.shape == shape and result.loss.sum() == 0
        assert result.belief.shape == result.dlogits.shape == (0, 10)


def test_rows_that_do_not_count(plans):
    """Check ignored rows: zeros, a written belief, a mean of 0 over no rows, and ignore_index as a valid label."""
    case = make_case(5, 37)
    case.target.fill_(-100)
    result = check(case)
    assert result.loss == 0 and result.dlogits.abs().max() == 0
    case = make_case(5, 37, ignore_index=3)
    case.target[::2] = 3
    case.logits[0, 5] = math.nan  # ignored rows do not affect the mean
    result = run(case)
    assert result.loss.isfinite() and torch.equal(result.dlogits[::2], torch.zeros(3, 37))
    assert result.belief[0].isnan().all()


def test_labels_out_of_range(plans):
    """Check that a bad label gives NaN in its row's loss and gradient, and disturbs or reads nothing else."""
    case = make_case(6, 37, reduction="none")
    good = run(case)
    case.target[1], case.target[3], case.target[4] = 37, -1, 2**40
    result = run(case)
    rows = torch.tensor([1, 3, 4])
    for value, before in zip(result, good, strict=True):
        same = torch.tensor([0, 2, 5])
        assert torch.equal(value[same], before[same])
    assert result.loss[rows].isnan().all() and result.dlogits[rows].isnan().all()
    assert torch.equal(result.belief, good.belief)
    case.options["reduction"] = "mean"
    assert run(case).loss.isnan()


@pytest.mark.parametrize("divergence", ("forward", "reverse"))
@pytest.mark.parametrize("soft", (False, True))
def test_masked_classes(plans, divergence, soft):
    """Check that logits of -inf without mass have no effect; the first whole chunk of the loop is masked."""
    case = make_case(4, 50, divergence=divergence, soft=soft, reduction="none", label_smoothing=0.0)
    if divergence == "reverse" and not soft:
        case.options["label_smoothing"] = 0.1
    masked = torch.zeros(4, 50, dtype=torch.bool)
    masked[:, :20] = True
    masked[:, 47:] = True
    case.logits[masked] = -math.inf
    case.prior[masked] = 0.0
    if soft:
        case.target[masked] = 0.0
    else:
        case.target[:] = torch.tensor([20, 25, 30, 46])
    result = check(case)
    assert torch.equal(result.belief[masked], torch.zeros(int(masked.sum())))
    assert result.loss.isfinite().all()


def test_mass_on_a_masked_class(plans):
    """Check that the forward loss is infinite and its gradient finite, as defined; also for a uniform prior."""
    for kinds in (dict(), dict(prior=False), dict(soft=True), dict(label_smoothing=0.1)):
        case = make_case(4, 37, reduction="none", **kinds)
        case.logits[1, 7] = -math.inf
        if kinds == {}:
            case.target[1] = 7
        result = run(case)
        truth = oracle(case)
        assert result.loss[1] == math.inf and result.dlogits.isfinite().all()
        assert torch.equal(result.loss.isinf(), truth.loss.isinf())
        p = truth.belief  # autograd's gradient is NaN there; the closed form is the definition
        q = torch.full_like(p, 1 / 37) if case.prior is None else case.prior.double()
        y, s = case.target, case.options.get("label_smoothing", 0.0)
        y = y if y.is_floating_point() else torch.nn.functional.one_hot(y, 37)
        y = (1 - s) * y.double() + s / 37
        expected = 0.5 * (y.sum(-1, keepdim=True) + q.sum(-1, keepdim=True)) * p - 0.5 * y - 0.5 * q
        torch.testing.assert_close(result.dlogits.double(), expected, atol=1e-6, rtol=0)


def test_all_classes_masked(plans):
    case = make_case(3, 37, reduction="none")
    case.logits[1] = -math.inf
    result = run(case)
    assert result.belief[1].isnan().all() and result.loss[1].isnan() | result.loss[1].isinf()
    assert result.loss[[0, 2]].isfinite().all() and result.dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ("logits", "prior", "target"))
def test_a_nan_stays_in_its_row(plans, name):
    for divergence in ("forward", "reverse"):
        case = make_case(5, 37, divergence=divergence, soft=True, reduction="none")
        before = run(case)
        getattr(case, name)[2, 5] = math.nan
        after = run(case)
        others = torch.tensor([0, 1, 3, 4])
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[others], y[others])
        assert after.loss[2].isnan() and after.dlogits[2].isnan().any()


def test_large_logits(plans):
    for dtype, size in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)):
        case = make_case(4, 37, dtype=dtype, reduction="none")
        case.logits[:, 3], case.logits[:, 30] = -size, size
        result = run(case)
        assert result.belief[:, 30].eq(1).all() and result.dlogits.isfinite().all()
        check(make_case(4, 37, dtype=dtype, scale=100.0))


@pytest.mark.parametrize("masked", (slice(0, 20), slice(20, 37)), ids=("first", "last"))
def test_reverse_with_logits_masked_by_the_least_float(plans, masked):
    """Check that finfo.min gives no NaN, although the jump to the next chunk's maximum overflows."""
    case = make_case(3, 37, divergence="reverse", label_smoothing=0.1, reduction="none")
    case.logits[:, masked] = torch.finfo(torch.float32).min
    result = run(case)
    assert all(x.isfinite().all() for x in result)


def test_a_prior_that_underflowed(plans):
    """Check that the reverse loss is large, not infinite: logarithms end at float32's smallest normal number."""
    case = make_case(4, 37, divergence="reverse", soft=True, dtype=torch.float16, reduction="none")
    case.prior[:, 5] = 0.0
    case.target[:, 6] = 0.0
    case.prior[3] = 0.0
    assert check(case).loss.isfinite().all()


def test_gradient_over_the_logits_themselves(plans):
    for kinds in (dict(), dict(soft=True), dict(divergence="reverse", label_smoothing=0.1)):
        case = make_case(5, 37, dtype=torch.bfloat16, **kinds)
        apart = run(case)
        logits = case.logits.clone()
        result = run(Case(logits, case.prior, case.target, case.alpha, case.options), out=logits)
        assert result.dlogits.data_ptr() == logits.data_ptr()
        for x, y in zip(apart, result, strict=True):
            assert torch.equal(x, y)


def test_without_gradient(plans):
    case = make_case(5, 37)
    assert run(case, need_grad=False).dlogits is None
    assert_within_budget(run(case, need_grad=False), None, case)


def test_rows_apart_and_rows_that_repeat(plans):
    case = make_case(4, 37, soft=True)
    expected = run(case)
    spread = [torch.full((4, 90), 7.0)[:, 11:48].copy_(x) for x in (case.logits, case.prior, case.target)]
    out = torch.zeros(4, 64)
    result = run(Case(*spread, case.alpha), out=out[:, :37])
    for x, y in zip(expected, result, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(out[:, 37:], torch.zeros(4, 27))
    check(Case(*(x[:1].expand(4, 37) for x in (case.logits, case.prior, case.target)), case.alpha))


def test_row_offsets_beyond_32_bits(plans):
    """Place three rows 2**30 + 64 elements apart: 4 GiB are reserved, and only the rows themselves are touched.

    A stride itself beyond 2**31 would be passed as 64 bits and hide a product taken in 32.
    """
    apart, case = 2**30 + 64, make_case(3, 37, dtype=torch.float16)
    expected = run(case)
    far = torch.empty(2 * apart + 37, dtype=torch.float16).as_strided((3, 37), (apart, 1))
    far.copy_(case.logits)
    result = run(Case(far, case.prior, case.target, case.alpha), out=far)
    for x, y in zip(expected, result, strict=True):
        assert torch.equal(x, y)
    core_triton.scale_(far, torch.tensor(2.0))
    assert torch.equal(far, expected.dlogits * 2)


def test_equal_bits_twice(plans):
    for kinds in (dict(), dict(soft=True, divergence="reverse")):
        case = make_case(9, 37, ignored=0.2, **kinds)
        for x, y in zip(run(case), run(case), strict=True):
            assert torch.equal(x, y)


def test_counting_in_a_launch_of_its_own(plans, monkeypatch):
    case = make_case(9, 20, ignored=0.4)
    here = run(case)
    monkeypatch.setattr(triton_kernels, "COUNT_HERE", 4)
    monkeypatch.setattr(triton_kernels, "COUNT_GRID_BLOCK", 4)
    apart = check(case)
    for x, y in zip(here, apart, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,classes", [(1, 1), (5, 37), (300, 16), (2, 5000)])
def test_scale(dtype, rows, classes):
    grad = torch.randn(rows, classes).to(dtype)
    row_scale = torch.randn(rows)
    row_scale[0] = 1.0
    one_for_all = torch.tensor(0.5).expand(rows)  # as the backward pass of a sum passes it on
    for scale in (torch.tensor(0.25), torch.tensor(1.0), row_scale, one_for_all):
        wide = torch.full((rows, classes + 5), 3.0, dtype=dtype)
        actual = core_triton.scale_(wide[:, :classes].copy_(grad), scale)
        assert torch.equal(actual, (grad.float() * (scale[:, None] if scale.dim() else scale)).to(dtype))
        assert torch.equal(wide[:, classes:], torch.full((rows, 5), 3.0, dtype=dtype))


def test_public_operations_and_autograd():
    case = make_case(6, 37, dtype=torch.bfloat16)
    actual, dlogits = local_loss_and_grad(case.logits, case.prior, case.target, case.alpha, backend="triton")
    assert_within_budget(actual, dlogits, case)
    z = case.logits.clone().requires_grad_()
    loss = fused_local_loss(z, case.prior, case.target, case.alpha, backend="triton").loss
    (loss * 2).backward()
    assert torch.equal(z.grad, dlogits * 2)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_incoming_gradient_is_rounded_once(dtype, reduction, monkeypatch):
    """Check that blocks of rows, here of three, are scaled in float32 before they are rounded."""
    monkeypatch.setattr(triton_kernels, "WIDE_BYTES", 3 * 4 * 70)
    case = make_case(8, 70, dtype=dtype, ignored=0.3, alpha="rows", reduction=reduction)
    z, exact = case.logits.clone().requires_grad_(), case.logits.double().requires_grad_()
    loss = fused_local_loss(z, case.prior, case.target, case.alpha, reduction=reduction, backend="triton").loss
    prior, alpha = case.prior.double(), case.alpha.double()
    truth = fused_local_loss(exact, prior, case.target, alpha, reduction=reduction, backend="reference").loss
    incoming = torch.linspace(-3, 3, 8) if reduction == "none" else torch.tensor(0.37)
    (actual,) = torch.autograd.grad(loss, z, incoming)
    (expected,) = torch.autograd.grad(truth, exact, incoming.double())
    assert actual.dtype is dtype and torch.allclose(loss.double(), truth, rtol=1e-5)
    assert torch.allclose(actual.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
