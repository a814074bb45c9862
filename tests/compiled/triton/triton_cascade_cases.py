"""Test the Triton cascade under Triton's interpreter against a plain PyTorch cascade, stage by stage, in float64.

pytest does not collect this file by itself: test_triton_interpreter.py runs it in a new process. By hand:
TRITON_INTERPRET=1 pytest tests/compiled/triton/triton_cascade_cases.py
"""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from helpers.grids import DTYPES, KINDS, TARGETS
from helpers.oracle import ROUNDINGS, Case, oracle
from sid_kernels.cascade import triton_launch as triton_cascade
from sid_kernels.cascade.problem import CascadeProblem, CascadeWeights
from sid_kernels.core.options import LossOptions, LossSpec
from sid_kernels.core.triton import INTERPRETING
from sid_kernels.local_loss import triton_launch as triton_kernels

assert INTERPRETING, "run through test_triton_interpreter.py"
# numpy warns about what the kernels intend: log 0, 0 * inf, -inf - -inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(
    rows=5, classes=10, features=7, units=20, stages=2, *, dtype=torch.float32, prior=False, prior_dtype=None,
    soft=False, ignored=0.0, alpha=0.5, seed=0, divergence="forward", label_smoothing=0.0, reduction="mean",
    need_grad=True,
) -> CascadeProblem:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    weights = CascadeWeights(
        normal(stages, units, classes + features, scale=1.5 / math.sqrt(features)),
        normal(stages, units, scale=0.3),
        normal(stages, classes, units, scale=2.0 / math.sqrt(units)),
        normal(stages, classes, scale=0.3),
    )
    labels = probabilities = None
    if soft:
        probabilities = normal(rows, classes, scale=2.0).float().softmax(-1).to(dtype)
    else:
        labels = torch.randint(0, classes, (rows,), generator=g)
        labels[torch.rand(rows, generator=g) < ignored] = -100
    p0 = normal(rows, classes, scale=2.0).float().softmax(-1).to(prior_dtype or dtype) if prior else None
    if alpha == "stages":
        alpha = torch.rand(stages, generator=g)
    features = normal(rows, features)
    spec = LossSpec(labels, probabilities, alpha, LossOptions(divergence, label_smoothing, reduction=reduction))
    return CascadeProblem(features, weights, p0, spec, need_grad)


class Values(NamedTuple):
    """The outputs of a cascade; losses (3, L, B): each row's share of the reduced value."""

    losses: Tensor
    beliefs: Tensor
    logits: Tensor
    dlogits: Tensor | None
    hidden: Tensor | None
    dhidden: Tensor | None


def run_rows(problem: CascadeProblem) -> Values:
    outputs = triton_cascade.run_rows(problem)
    return Values(*outputs[:3], *(outputs.activations or (None, None, None)))


def plain(problem: CascadeProblem, dtype: torch.dtype) -> Values:
    """Compute the cascade as PyTorch users write it in `dtype`: a detached prior, the loss by oracle.py, autograd."""
    w = CascadeWeights(*(x.to(dtype) for x in problem.weights))
    stages, classes, _ = w.logits_weight.shape
    f, spec = problem.features.to(dtype), problem.spec
    rows = f.shape[0]
    q = torch.full((rows, classes), 1 / classes, dtype=dtype) if problem.prior is None else problem.prior
    number = 1
    if spec.options.reduction == "mean":
        number = rows if spec.labels is None else max(int((spec.labels != spec.options.ignore_index).sum()), 1)
    columns = []
    for i in range(stages):
        before = linear(torch.cat([q.to(dtype), f], 1), w.hidden_weight[i], w.hidden_bias[i]).requires_grad_()
        h = relu(before)
        z = linear(h, w.logits_weight[i], w.logits_bias[i])
        alpha = float(spec.alpha[i]) if isinstance(spec.alpha, Tensor) else spec.alpha
        options = dataclasses.asdict(spec.options) | dict(reduction="none")
        truth = oracle(Case(z, q, spec.target, alpha, options), torch.promote_types(dtype, torch.float32))
        dz = (truth.dlogits / number).to(dtype)
        (dbefore,) = torch.autograd.grad(z, before, dz)
        losses = torch.stack([truth.loss, truth.fidelity, truth.consistency]) / number
        q = truth.belief.to(dtype)
        columns.append([x.detach() for x in (losses, q, z, h, dz, dbefore)])
    losses, beliefs, logits, hidden, dlogits, dhidden = zip(*columns, strict=True)
    by_stage = [torch.stack(x) for x in (beliefs, dlogits, hidden, dhidden)]
    return Values(torch.stack(losses, 1), by_stage[0], logits[-1], *by_stage[1:])


def check(problem: CascadeProblem) -> Values:
    """Hold each value to PyTorch's error in the same dtype, against float64, plus a few roundings of the largest.

    PyTorch's own error is the largest of the stage: an early difference passes through all that follows.
    """
    dtype = problem.weights.hidden_weight.dtype
    actual, expected, peer = run_rows(problem), plain(problem, torch.float64), plain(problem, dtype)
    for name, x, truth, other in zip(Values._fields, actual, expected, peer, strict=True):
        if x is None:
            assert not problem.need_grad and name in ("hidden", "dlogits", "dhidden")
            continue
        assert x.shape == truth.shape and x.dtype == (torch.float32 if name == "losses" else dtype), name
        x, other = x.double(), other.double()
        assert torch.equal(x.isfinite(), truth.isfinite()), name
        assert torch.equal(x[truth.isinf()], truth[truth.isinf()]), name
        x, truth, other = (v.nan_to_num(0.0, 0.0, 0.0) for v in (x, truth, other))
        last = tuple(range(-2, 0)) if name != "losses" else (0, 2)
        largest, own = truth.abs().amax(last, keepdim=True), (other - truth).abs().amax(last, keepdim=True)
        info = torch.finfo(dtype)
        allowed = own + ROUNDINGS * (info.eps / 2 * largest + info.tiny * info.eps)
        worst = ((x - truth).abs() - allowed).max()
        assert worst <= 0, f"{name}: {worst:.2e} beyond what is allowed, at most {allowed.max():.2e}"
    return actual


@pytest.mark.parametrize("divergence,target", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind(dtype, divergence, target):
    other = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    for kinds in (dict(reduction="sum"), dict(prior=True, alpha="stages"), dict(prior=True, prior_dtype=other)):
        check(make(dtype=dtype, divergence=divergence, **TARGETS[target], **kinds))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", (1, 2, 10, 16, 37, 100, 200))
def test_classes(classes, dtype):
    check(make(3, classes, 5, 40, 2, dtype=dtype, prior=True, label_smoothing=0.1, divergence="reverse"))
    check(make(3, classes, 5, 33, 1, dtype=dtype, soft=True))


@pytest.mark.parametrize(
    "rows,features,units,stages", [(1, 1, 1, 1), (1, 4, 64, 3), (16, 3, 65, 1), (17, 5, 130, 2), (33, 2, 7, 4)]
)
def test_odd_sizes(rows, features, units, stages):
    check(make(rows, 10, features, units, stages, alpha="stages", ignored=0.2))
    check(make(rows, 10, features, units, stages, dtype=torch.bfloat16, soft=True))


def test_without_gradient():
    for kinds in (dict(), dict(prior=True, soft=True)):
        problem = make(**kinds)
        actual, bare = run_rows(problem), check(problem._replace(need_grad=False))
        for x, y in zip(actual[:3], bare[:3], strict=True):
            assert torch.equal(x, y)
        assert bare[3:6] == (None, None, None)


def test_no_rows():
    actual = run_rows(make(rows=0))
    assert (
        actual.losses.shape == (3, 2, 0) and actual.beliefs.shape == (2, 0, 10) and actual.dhidden.shape == (2, 0, 20)
    )


def test_rows_that_do_not_count():
    """Check ignored rows: losses and gradients are 0, beliefs are written, and the mean over no rows is 0."""
    problem = make()
    before = run_rows(problem)
    problem.spec.labels.fill_(-100)
    actual = check(problem)
    assert not actual.losses.any() and not actual.dlogits.any() and not actual.dhidden.any()
    assert torch.equal(actual.beliefs, before.beliefs)


def test_labels_out_of_range():
    """Check that a bad label gives NaN in its row's losses and gradients at every stage, and disturbs no other row."""
    problem = make(6, reduction="sum")
    before = run_rows(problem)
    problem.spec.labels[1], problem.spec.labels[4] = 10, -1
    actual = run_rows(problem)
    bad, good = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    assert actual.losses[:, :, bad].isnan().all() and actual.dlogits[:, bad].isnan().all()
    assert actual.dhidden[:, bad][actual.hidden[:, bad] > 0].isnan().all()
    assert torch.equal(actual.beliefs, before.beliefs) and torch.equal(
        actual.losses[:, :, good], before.losses[:, :, good]
    )
    assert torch.equal(actual.dhidden[:, good], before.dhidden[:, good])


@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_masked_classes(divergence):
    """Mask a class by a bias of -inf: it has no belief and no gradient, and losses are finite if the prior agrees."""
    for kinds in (dict(soft=True), dict(label_smoothing=0.1)):
        if divergence == "forward":
            kinds["label_smoothing"] = 0.0
        problem = make(4, 10, prior=True, divergence=divergence, **kinds)
        problem.weights.logits_bias[:, 3] = -math.inf
        problem.prior[:, 3] = 0.0
        if problem.spec.soft is None:
            problem.spec.labels[problem.spec.labels == 3] = 4
        else:
            problem.spec.soft[:, 3] = 0.0
        actual = check(problem)
        assert (
            actual.losses.isfinite().all() and not actual.beliefs[:, :, 3].any() and not actual.dlogits[:, :, 3].any()
        )


def test_mass_on_a_masked_class():
    """Check that the first stage's loss is infinite if the uniform prior has mass there, and what follows finite."""
    problem = make(4, 10)
    problem.weights.logits_bias[:, 3] = -math.inf
    problem.spec.labels[:] = 5
    actual = run_rows(problem)
    assert torch.equal(actual.losses[2].isinf(), torch.tensor([[True], [False]]).expand(2, 4))
    assert actual.dlogits.isfinite().all() and actual.dhidden.isfinite().all()


def test_a_nan_stays_in_its_row():
    for name in ("features", "prior", "soft"):
        problem = make(5, soft=True, prior=True)
        before = run_rows(problem)
        getattr(problem.spec if name == "soft" else problem, name)[2, 3] = math.nan
        after = run_rows(problem)
        others = torch.tensor([0, 1, 3, 4])
        for field in ("beliefs", "dlogits", "dhidden", "hidden"):
            assert torch.equal(getattr(before, field)[:, others], getattr(after, field)[:, others])
        assert torch.equal(before.losses[:, :, others], after.losses[:, :, others])
        assert after.losses[0, :, 2].isnan().any() and after.dlogits[:, 2].isnan().any()


def test_rows_apart_and_rows_that_repeat():
    problem = make(4, soft=True, prior=True)
    expected = run_rows(problem)
    far = [torch.full((4, 30), 7.0)[:, 5:15].copy_(x) for x in (problem.prior, problem.spec.soft)]
    features = torch.full((7, 9), 3.0).t()[:4, :].contiguous().t()[:7].t().copy_(problem.features)
    actual = run_rows(problem._replace(prior=far[0], spec=problem.spec._replace(soft=far[1]), features=features))
    for x, y in zip(expected, actual, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    check(
        problem._replace(
            prior=problem.prior[:1].expand(4, 10), spec=problem.spec._replace(soft=problem.spec.soft[:1].expand(4, 10))
        )
    )


def test_counting_in_a_launch_of_its_own(monkeypatch):
    problem = make(9, ignored=0.4)
    here = run_rows(problem)
    monkeypatch.setattr(triton_kernels, "COUNT_HERE", 4)
    monkeypatch.setattr(triton_kernels, "COUNT_GRID_BLOCK", 4)
    for x, y in zip(here[:6], check(problem)[:6], strict=True):
        assert torch.equal(x, y)


def test_layouts_that_matrix_products_take():
    """Check that hidden, dhidden and dlogits go to torch.bmm as they are, and dhidden (B, L H) to one product."""
    actual = run_rows(make(5, 10, 7, 20, 3))
    assert actual.hidden.stride() == actual.dhidden.stride() == (20, 60, 1) and actual.dlogits.is_contiguous()
    assert actual.dhidden.transpose(0, 1).is_contiguous()


def test_equal_bits_twice():
    for dtype in DTYPES:
        for x, y in zip(*(run_rows(make(9, dtype=dtype))[:6] for _ in range(2)), strict=True):
            assert torch.equal(x, y)


def test_what_fits():
    assert triton_cascade.fits(10, 256, 128, 10, torch.float32)
    assert triton_cascade.fits(256, 1, 1, 1, torch.bfloat16)
    assert not triton_cascade.fits(257, 256, 128, 10, torch.float32)
    assert not triton_cascade.fits(10, 256, 128, 10, torch.float64)
    assert not triton_cascade.fits(10, 2**20, 4096, 10, torch.float32)
