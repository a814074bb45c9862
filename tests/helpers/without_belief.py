"""Make the cases on which a call without a belief is compared with one that has it, and compare them."""

import torch

from sid_kernels.core.options import LossOptions
from sid_kernels.local_loss.problem import LocalLossOutputs, make_problem

SIZES = ((5, 1), (9, 10), (5, 37), (3, 1000), (2, 5000))
DIVERGENCES = ("forward", "reverse")
TARGETS = {"hard": dict(label_smoothing=0.1, ignored=0.3), "soft": dict(soft=True)}
PRIORS = {"same": dict(), "none": dict(prior=False), "other dtype": dict(prior_dtype=torch.float16)}


def problem(case, out=None, need_grad=True, need_belief=True):
    needs = dict(out=out, need_grad=need_grad, need_belief=need_belief)
    return make_problem(case.logits, case.prior, case.target, case.alpha, LossOptions(**case.options), **needs)


def assert_equal_except_belief(without: LocalLossOutputs, beside: LocalLossOutputs):
    """Check that two results are equal bit for bit, except for the belief."""
    assert without.belief is None and beside.belief is not None
    for name in ("loss", "fidelity", "consistency", "dlogits"):
        one, other = getattr(without, name), getattr(beside, name)
        if one is None or other is None:
            assert one is other, name
        else:
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
