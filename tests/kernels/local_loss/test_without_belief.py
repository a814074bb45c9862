"""Where the belief is not wanted, everything else has the bits it has beside one, also with dlogits over the logits.

Triton's kernels are held to the same in triton_belief_cases.py.
"""

import pytest
import simt_library as simt
import test_cuda_source_on_host as on_host
import torch
from oracle import make_case
from test_accuracy import DTYPES

from sid_kernels.local_loss import dispatch as backends
from sid_kernels.local_loss.problem import Result, make_problem

SIZES = ((5, 1), (9, 10), (5, 37), (3, 1000), (2, 5000))
DIVERGENCES = ("forward", "reverse")
TARGETS = {"hard": dict(label_smoothing=0.1, ignored=0.3), "soft": dict(soft=True)}
PRIORS = {"same": dict(), "none": dict(prior=False), "other dtype": dict(prior_dtype=torch.float16)}


def problem(case, out=None, need_grad=True, need_belief=True):
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    return make_problem(case.logits, case.prior, case.target, case.alpha, *o.values(), out, need_grad, need_belief)


def assert_same_but_for_the_belief(without: Result, beside: Result):
    """Bit for bit."""
    assert without.belief is None and beside.belief is not None
    for name in ("loss", "fidelity", "consistency", "dlogits"):
        one, other = getattr(without, name), getattr(beside, name)
        if one is None or other is None:
            assert one is other, name
        else:
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(backend, dtype, divergence, target, prior):
    for (rows, classes), reduction in zip(SIZES, ("mean", "sum", "none", "mean", "none"), strict=True):
        case = make_case(
            rows, classes, dtype=dtype, divergence=divergence, reduction=reduction, alpha="rows", seed=classes,
            **TARGETS[target], **PRIORS[prior],
        ).to(backend.device)  # fmt: skip
        beside = backends.run(problem(case), backend.name)
        assert_same_but_for_the_belief(backends.run(problem(case, need_belief=False), backend.name), beside)
        loss_alone = backends.run(problem(case, need_grad=False, need_belief=False), backend.name)
        assert_same_but_for_the_belief(loss_alone, beside._replace(dlogits=None))
        over = backends.run(problem(case, out=case.logits, need_belief=False), backend.name)
        assert over.dlogits.data_ptr() == case.logits.data_ptr()
        assert_same_but_for_the_belief(over, beside)


def test_float64():
    case = make_case(4, 9, dtype=torch.float64)
    without = backends.run(problem(case, need_belief=False), "reference")
    assert_same_but_for_the_belief(without, backends.run(problem(case), "reference"))


# ---- the CUDA source on the host -------------------------------------------------------------------------------------

on_the_host = pytest.mark.skipif(simt.why_not() is not None, reason=f"CUDA sources: {simt.why_not()}")


@on_the_host
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", simt.KINDS)
def test_cuda_source(kind, divergence, target):
    """By the launcher's own plan, and with rows over lanes of a warp and over a cluster."""
    plans = (None, on_host.plan(kind, 16), on_host.plan(kind, 0, threads=32, cluster=2))
    for prior, (rows, classes) in ((p, s) for p in PRIORS for s in SIZES):
        case = make_case(
            rows, classes, dtype=on_host.DTYPES[kind], divergence=divergence, **TARGETS[target], **PRIORS[prior]
        )
        if kind != "any" and prior == "other dtype":
            continue  # that is what `any` is for
        for plan in plans[:1] if classes == 5000 else plans:
            beside = simt.run(case, plan)
            assert_same_but_for_the_belief(simt.run(case, plan, need_belief=False), beside)
            assert_same_but_for_the_belief(simt.run(case, plan, need_belief=False, alias=True), beside)
            loss_alone = simt.run(case, plan, need_belief=False, need_grad=False)
            assert_same_but_for_the_belief(loss_alone, beside._replace(dlogits=None))


@on_the_host
@pytest.mark.parametrize("kind", ("f32", "bf16", "f16"))
def test_cuda_plan(kind):
    """A belief that is not there asks for no narrower accesses, whatever its dtype and address say."""
    for shift in (0, 1):
        case = make_case(4, 64, dtype=on_host.DTYPES[kind])
        case.logits, case.prior = simt.shifted(case.logits, shift), simt.shifted(case.prior, shift)
        argument, _ = simt.problem_of(case, None, True, shift, need_belief=False)
        assert on_host.chosen(argument).kind == simt.KINDS.index(kind)
