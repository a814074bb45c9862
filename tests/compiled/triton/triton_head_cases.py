"""Test the Triton belief head under Triton's interpreter against a linear layer and oracle.py in float64.

pytest does not collect this file by itself: test_triton_interpreter.py runs it in a new process. By hand:
TRITON_INTERPRET=1 pytest tests/compiled/triton/triton_head_cases.py
"""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import linear

from helpers.grids import DTYPES, KINDS, TARGETS
from helpers.oracle import ROUNDINGS, Case, make_case, oracle
from sid_kernels.belief_head import triton_launch as triton_head
from sid_kernels.belief_head.problem import BeliefHeadOutputs, BeliefHeadProblem, NeedGrad
from sid_kernels.core.options import LossOptions, LossSpec
from sid_kernels.core.triton import INTERPRETING
from sid_kernels.local_loss import triton_launch as triton_kernels

assert INTERPRETING, "run through test_triton_interpreter.py"
# numpy warns about what the kernels intend: log 0, 0 * inf, -inf - -inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(
    rows=5, classes=10, units=20, *, dtype=torch.float32, bias=True, divergence="forward", label_smoothing=0.0,
    reduction="mean", seed=0, need=(True, True, True), **kinds,
) -> BeliefHeadProblem:  # fmt: skip
    """Return a head with prior, target and alpha as `make_case` draws them; need: the belief, dlogits and dhidden."""
    g = torch.Generator().manual_seed(seed)
    case = make_case(rows, classes, dtype=dtype, seed=seed, **kinds)
    hard = not case.target.is_floating_point()
    options = LossOptions(divergence, label_smoothing, reduction=reduction)
    spec = LossSpec(case.target if hard else None, None if hard else case.target, case.alpha, options)
    return BeliefHeadProblem(
        torch.randn(rows, units, generator=g).to(dtype),
        (torch.randn(classes, units, generator=g) * (2.0 / math.sqrt(units))).to(dtype),
        torch.randn(classes, generator=g).to(dtype) if bias else None,
        case.prior, spec, need[0], NeedGrad(need[2], need[1], need[1]),
    )  # fmt: skip


def plain(problem: BeliefHeadProblem, dtype: torch.dtype) -> BeliefHeadOutputs:
    """Compute a linear layer in `dtype`, then the local loss of its logits, and autograd's gradient by oracle.py."""
    hidden, weight, bias = (None if x is None else x.to(dtype) for x in problem[:3])
    z = linear(hidden, weight, bias)
    number, spec = 1, problem.spec
    if spec.options.reduction == "mean":
        number = z.shape[0] if spec.labels is None else max(int((spec.labels != spec.options.ignore_index).sum()), 1)
    options = dataclasses.asdict(spec.options) | dict(reduction="none")
    case = Case(z, problem.prior, spec.target, spec.alpha, options)
    truth = oracle(case, torch.promote_types(dtype, torch.float32))
    dz = (truth.dlogits / number).to(dtype)
    losses = torch.stack([truth.loss, truth.fidelity, truth.consistency]) / number
    return BeliefHeadOutputs(losses, truth.belief, dz, dz @ weight)


def check(problem: BeliefHeadProblem) -> BeliefHeadOutputs:
    """Hold each value to PyTorch's error in the same dtype, against float64, plus a few roundings of the largest."""
    dtype = problem.hidden.dtype
    belief_dtype = dtype if problem.prior is None else problem.prior.dtype
    actual, want, peer = triton_head.run(problem), plain(problem, torch.float64), plain(problem, dtype)
    wanted = dict(belief=problem.need_belief, dlogits=problem.need_grad, dhidden=problem.need.hidden)
    for name, x, truth, other in zip(BeliefHeadOutputs._fields, actual, want, peer, strict=True):
        if not wanted.get(name, True):
            assert x is None, name
            continue
        assert x.shape == truth.shape, name
        assert x.dtype == dict(losses=torch.float32, belief=belief_dtype, dhidden=torch.float32).get(name, dtype), name
        info = torch.finfo(x.dtype if name == "belief" else dtype)
        x, other = x.double(), other.double()
        assert torch.equal(x.isfinite(), truth.isfinite()), name
        assert torch.equal(x[truth.isinf()], truth[truth.isinf()]), name
        x, truth, other = (v.nan_to_num(0.0, 0.0, 0.0) for v in (x, truth, other))
        rows = (0, 1) if name != "losses" else (1,)
        largest, own = truth.abs().amax(rows, keepdim=True), (other - truth).abs().amax(rows, keepdim=True)
        allowed = own + ROUNDINGS * (info.eps / 2 * largest + info.tiny * info.eps)
        worst = ((x - truth).abs() - allowed).max()
        assert worst <= 0, f"{name}: {worst:.2e} beyond what is allowed, at most {allowed.max():.2e}"
    return actual


@pytest.mark.parametrize("divergence,target", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind(dtype, divergence, target):
    other = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    for kinds in (
        dict(prior=False, reduction="sum"), dict(alpha="rows"), dict(prior_dtype=other, bias=False, alpha="scalar"),
    ):  # fmt: skip
        check(make(dtype=dtype, divergence=divergence, **TARGETS[target], **kinds))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", (1, 2, 10, 16, 37, 100, 200))
def test_classes(classes, dtype):
    check(make(3, classes, 70, dtype=dtype, label_smoothing=0.1, divergence="reverse"))
    check(make(3, classes, 33, dtype=dtype, soft=True, prior=False))


@pytest.mark.parametrize("rows,units", [(1, 1), (1, 64), (32, 65), (33, 130), (70, 7)])
def test_odd_sizes(rows, units):
    check(make(rows, 10, units, alpha="rows", ignored=0.2))
    check(make(rows, 10, units, dtype=torch.bfloat16, soft=True))


def test_only_what_is_asked_for():
    whole = triton_head.run(make())
    for need in ((False, True, True), (True, True, False), (True, False, False), (False, False, False)):
        for x, y in zip(whole, check(make(need=need)), strict=True):
            assert y is None or torch.equal(x, y)


def test_no_rows():
    actual = triton_head.run(make(rows=0))
    assert [x.shape for x in actual] == [(3, 0), (0, 10), (0, 10), (0, 20)]


def test_rows_that_do_not_count():
    problem = make()
    before = triton_head.run(problem)
    problem.spec.labels.fill_(-100)
    actual = check(problem)
    assert not actual.losses.any() and not actual.dlogits.any() and not actual.dhidden.any()
    assert torch.equal(actual.belief, before.belief)


def test_labels_out_of_range():
    """Check that a bad label gives NaN in its row's losses and gradients, and disturbs no other row."""
    problem = make(6, reduction="sum")
    before = triton_head.run(problem)
    problem.spec.labels[1], problem.spec.labels[4] = 10, -1
    actual = triton_head.run(problem)
    bad, good = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    assert (
        actual.losses[:, bad].isnan().all() and actual.dlogits[bad].isnan().all() and actual.dhidden[bad].isnan().all()
    )
    assert torch.equal(actual.belief, before.belief) and torch.equal(actual.losses[:, good], before.losses[:, good])
    assert torch.equal(actual.dhidden[good], before.dhidden[good])


@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_masked_classes(divergence):
    """Mask a class by a bias of -inf: it has no belief and no gradient, and losses are finite if the prior agrees."""
    for kinds in (dict(soft=True), dict(label_smoothing=0.0 if divergence == "forward" else 0.1)):
        problem = make(4, 10, divergence=divergence, **kinds)
        problem.bias[3] = -math.inf
        problem.prior[:, 3] = 0.0
        if problem.spec.soft is None:
            problem.spec.labels[problem.spec.labels == 3] = 4
        else:
            problem.spec.soft[:, 3] = 0.0
        actual = check(problem)
        assert actual.losses.isfinite().all() and not actual.belief[:, 3].any() and not actual.dlogits[:, 3].any()


def test_mass_on_a_masked_class():
    """Check that the forward loss is infinite and gradients finite if the uniform prior has mass on a masked class."""
    problem = make(4, 10, prior=False)
    problem.bias[3] = -math.inf
    problem.spec.labels[:] = 5
    actual = triton_head.run(problem)
    assert actual.losses[2].isinf().all() and actual.losses[1].isfinite().all()
    assert actual.dlogits.isfinite().all() and actual.dhidden.isfinite().all()


def test_a_nan_stays_in_its_row():
    for name in ("hidden", "prior", "soft"):
        problem = make(5, soft=True)
        before = triton_head.run(problem)
        getattr(problem.spec if name == "soft" else problem, name)[2, 3] = math.nan
        after = triton_head.run(problem)
        others = torch.tensor([0, 1, 3, 4])
        for x, y in zip(before[1:], after[1:], strict=True):
            assert torch.equal(x[others], y[others])
        assert torch.equal(before.losses[:, others], after.losses[:, others])
        assert after.losses[0, 2].isnan() and after.dlogits[2].isnan().any()


def test_rows_apart_and_rows_that_repeat():
    problem = make(4, 10, 20, soft=True)
    expected = triton_head.run(problem)
    inputs = (problem.hidden, problem.prior, problem.spec.soft)
    far = [torch.full((4, 50), 7.0)[:, 5 : 5 + x.shape[1]].copy_(x) for x in inputs]

    def replaced(hidden, prior, soft):
        return problem._replace(hidden=hidden, prior=prior, spec=problem.spec._replace(soft=soft))

    for x, y in zip(expected, triton_head.run(replaced(*far)), strict=True):
        assert torch.equal(x, y)
    check(replaced(*(x[:1].expand(4, -1) for x in far)))


def test_row_offsets_beyond_32_bits():
    """Place three rows 2**30 + 64 elements apart: 4 GiB are reserved, and only the rows themselves are touched."""
    apart, problem = 2**30 + 64, make(3, dtype=torch.float16)
    far = torch.empty(2 * apart + 20, dtype=torch.float16).as_strided((3, 20), (apart, 1)).copy_(problem.hidden)
    for x, y in zip(triton_head.run(problem), triton_head.run(problem._replace(hidden=far)), strict=True):
        assert torch.equal(x, y)


def test_counting_in_a_launch_of_its_own(monkeypatch):
    problem = make(9, ignored=0.4)
    here = triton_head.run(problem)
    monkeypatch.setattr(triton_kernels, "COUNT_HERE", 4)
    monkeypatch.setattr(triton_kernels, "COUNT_GRID_BLOCK", 4)
    for x, y in zip(here, check(problem), strict=True):
        assert torch.equal(x, y)


def test_equal_bits_twice():
    for dtype in DTYPES:
        for x, y in zip(*(triton_head.run(make(9, dtype=dtype)) for _ in range(2)), strict=True):
            assert torch.equal(x, y)


def test_what_fits():
    assert triton_head.fits(10, 256, torch.float32) and triton_head.fits(256, 1, torch.bfloat16)
    assert not triton_head.fits(257, 256, torch.float32)
    assert not triton_head.fits(10, 256, torch.float64)
