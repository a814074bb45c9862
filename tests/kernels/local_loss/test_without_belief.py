"""Tests that without the belief all other outputs have equal bits, also if dlogits overwrite the logits.

triton_belief_cases.py tests the same for the Triton kernels.
"""

import pytest
import torch

from helpers import simt_library as simt
from helpers.grids import DTYPES
from helpers.oracle import make_case
from helpers.without_belief import DIVERGENCES, PRIORS, SIZES, TARGETS, assert_equal_except_belief, problem
from sid_kernels.local_loss import dispatch


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
        beside = dispatch.run(problem(case), backend.name)
        assert_equal_except_belief(dispatch.run(problem(case, need_belief=False), backend.name), beside)
        loss_alone = dispatch.run(problem(case, need_grad=False, need_belief=False), backend.name)
        assert_equal_except_belief(loss_alone, beside._replace(dlogits=None))
        over = dispatch.run(problem(case, out=case.logits, need_belief=False), backend.name)
        assert over.dlogits.data_ptr() == case.logits.data_ptr()
        assert_equal_except_belief(over, beside)


def test_float64():
    case = make_case(4, 9, dtype=torch.float64)
    without = dispatch.run(problem(case, need_belief=False), "reference")
    assert_equal_except_belief(without, dispatch.run(problem(case), "reference"))


# ---- the CUDA source on the host -------------------------------------------------------------------------------------

on_the_host = pytest.mark.skipif(simt.why_not() is not None, reason=f"CUDA sources: {simt.why_not()}")


@on_the_host
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", simt.KINDS)
def test_cuda_source(kind, divergence, target):
    """Test the plan of the launcher, rows over lanes of a warp, and rows over a cluster."""
    plans = (None, simt.plan(kind, 16), simt.plan(kind, 0, threads=32, cluster=2))
    for prior, (rows, classes) in ((p, s) for p in PRIORS for s in SIZES):
        case = make_case(
            rows, classes, dtype=simt.KIND_DTYPES[kind], divergence=divergence, **TARGETS[target], **PRIORS[prior]
        )
        if kind != "any" and prior == "other dtype":
            continue  # that is the purpose of `any`
        for plan in plans[:1] if classes == 5000 else plans:
            beside = simt.run(case, plan)
            assert_equal_except_belief(simt.run(case, plan, need_belief=False), beside)
            assert_equal_except_belief(simt.run(case, plan, need_belief=False, alias=True), beside)
            loss_alone = simt.run(case, plan, need_belief=False, need_grad=False)
            assert_equal_except_belief(loss_alone, beside._replace(dlogits=None))


@on_the_host
@pytest.mark.parametrize("kind", ("f32", "bf16", "f16"))
def test_cuda_plan(kind):
    """Check that a belief that is not wanted does not narrow the accesses, whatever its dtype and address."""
    for shift in (0, 1):
        case = make_case(4, 64, dtype=simt.KIND_DTYPES[kind])
        case.logits, case.prior = simt.copy_shifted(case.logits, shift), simt.copy_shifted(case.prior, shift)
        argument, _ = simt.problem_of(case, None, True, shift, need_belief=False)
        assert simt.choose_plan(argument).kind == simt.KINDS.index(kind)
