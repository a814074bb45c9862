"""Tests of every backend, dtype and option against the error budget of oracle.py, and of the budget itself.

The budget's test breaks correct results in the ways kernels go wrong, and each must be noticed.
"""

import itertools

import pytest
import torch

from helpers.grids import DTYPES, KINDS, TARGETS
from helpers.local_loss import run
from helpers.oracle import assert_within_budget, make_case, oracle
from sid_kernels import fused_local_loss, local_loss_and_grad

BORDERS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2049)  # of vectors and of blocks


@pytest.mark.parametrize("prior", ("same", "none", "other dtype"))
@pytest.mark.parametrize("divergence,target", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind(backend, dtype, divergence, target, prior):
    prior_dtype = DTYPES[(DTYPES.index(dtype) + (prior == "other dtype")) % 3]
    for alpha, reduction in itertools.product((0.0, 0.3, 1.0, "scalar", "rows"), ("mean", "sum", "none")):
        case = make_case(
            5, 37, dtype=dtype, prior=prior != "none", prior_dtype=prior_dtype, alpha=alpha, seed=1,
            divergence=divergence, reduction=reduction, **TARGETS[target],
        )  # fmt: skip
        run(case, backend)


@pytest.mark.parametrize("divergence,target", KINDS)
@pytest.mark.parametrize("classes", BORDERS)
def test_borders_of_vectors_and_blocks(backend, classes, divergence, target):
    for dtype, prior in itertools.product(DTYPES, (True, False)):
        run(
            make_case(3, classes, dtype=dtype, prior=prior, divergence=divergence, seed=classes, **TARGETS[target]),
            backend,
        )


@pytest.mark.parametrize("divergence,target", KINDS)
def test_float64_is_the_reference_backends(divergence, target):
    for alpha, prior in itertools.product((0.3, "rows"), (True, False)):
        case = make_case(4, 9, dtype=torch.float64, prior=prior, divergence=divergence, alpha=alpha, **TARGETS[target])
        for name in ("reference", "auto"):
            result, dlogits = local_loss_and_grad(
                case.logits, case.prior, case.target, case.alpha, backend=name, **case.options
            )
            assert_within_budget(result, dlogits, case)


@pytest.mark.parametrize("prior", (True, False))
@pytest.mark.parametrize("divergence,target", KINDS)
def test_gradcheck(divergence, target, prior):
    for alpha, reduction in itertools.product((0.0, 0.4, 1.0, "rows"), ("none", "mean", "sum")):
        case = make_case(4, 6, dtype=torch.float64, prior=prior, alpha=alpha, divergence=divergence, **TARGETS[target])
        alpha = case.alpha.double() if isinstance(case.alpha, torch.Tensor) else case.alpha

        def loss(z, case=case, alpha=alpha, reduction=reduction):
            options = case.options | {"reduction": reduction, "backend": "reference"}
            return fused_local_loss(z, case.prior, case.target, alpha, **options).loss

        assert torch.autograd.gradcheck(loss, case.logits.requires_grad_())


# ---- the budget notices ----------------------------------------------------------------------------------------------


def broken(case, **changes):
    """Return a correct float32 result with `changes`: for a field, a function of the float64 truth."""
    truth = oracle(case)
    names = ("loss", "fidelity", "consistency", "belief", "dlogits")
    for name in names:
        value = getattr(truth, name)
        setattr(truth, name, changes.get(name, lambda x: x)(value).to(torch.float32))
    return truth


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("divergence", ("forward", "reverse"))
@pytest.mark.parametrize("classes", (10, 1000))
@pytest.mark.parametrize("field", ("loss", "fidelity", "consistency", "belief", "dlogits"))
def test_budget_notices_an_error_of_one_in_ten_thousand(field, classes, divergence, reduction):
    case = make_case(64, classes, soft=True, divergence=divergence, reduction=reduction, scale=1.0)
    truth = broken(case)
    assert_within_budget(truth, truth.dlogits, case)
    wrong = broken(case, **{field: lambda x: x * (1 + 1e-4)})
    with pytest.raises(AssertionError, match=f"^{field}: error"):
        assert_within_budget(wrong, wrong.dlogits, case)


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_budget_notices_forgotten_masses(reduction):
    """Check that the budget notices a gradient without sum y or sum q if they are not 1."""
    case = make_case(16, 10, soft=True, reduction=reduction)
    case.target, case.prior = case.target * 0.999, case.prior * 1.001
    number = 16 if reduction == "mean" else 1
    a, p = 0.5, case.logits.double().softmax(-1)
    y, q = case.target.double(), case.prior.double()
    target_mass, prior_mass = y.sum(-1, keepdim=True), q.sum(-1, keepdim=True)

    def gradient(target_mass, prior_mass):
        return ((a * target_mass + (1 - a) * prior_mass) * p - a * y - (1 - a) * q) / number

    right = broken(case, dlogits=lambda _: gradient(target_mass, prior_mass))
    assert_within_budget(right, right.dlogits, case)
    for masses in ((1, prior_mass), (target_mass, 1)):
        wrong = broken(case, dlogits=lambda _, masses=masses: gradient(*masses))
        with pytest.raises(AssertionError, match="^dlogits: error"):
            assert_within_budget(wrong, wrong.dlogits, case)


def test_budget_notices_a_second_rounding_to_half():
    """Check that a belief rounded to bfloat16 and then to float16 is outside the budget."""
    case = make_case(8, 64, dtype=torch.float16)
    truth = oracle(case)
    for name in ("loss", "fidelity", "consistency"):
        setattr(truth, name, getattr(truth, name).float())
    truth.dlogits, truth.belief = truth.dlogits.half(), truth.belief.half()
    assert_within_budget(truth, truth.dlogits, case)
    truth.belief = truth.belief.bfloat16().half()
    with pytest.raises(AssertionError, match="^belief: error"):
        assert_within_budget(truth, truth.dlogits, case)


def test_budget_notices_masks_and_dtypes():
    case = make_case(4, 8)
    truth = broken(case, dlogits=lambda x: x.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(AssertionError, match="dlogits: NaN in other places"):
        assert_within_budget(truth, truth.dlogits, case)
    truth = broken(case, loss=lambda x: x * torch.inf)
    with pytest.raises(AssertionError, match="loss: error"):
        assert_within_budget(truth, truth.dlogits, case)
    truth = broken(case)
    truth.belief = truth.belief.double()
    with pytest.raises(AssertionError, match="belief: dtype"):
        assert_within_budget(truth, truth.dlogits, case)
