"""Calls of the local loss on a case of `oracle.py`."""

from helpers.oracle import Case, assert_within_budget
from sid_kernels import local_loss_and_grad


def run(case: Case, backend, **more):
    """Run on the backend and device, and hold the result to the budget."""
    on = case.to(backend.device)
    result, dlogits = local_loss_and_grad(
        on.logits, on.prior, on.target, on.alpha, backend=backend.name, **on.options, **more
    )
    assert_within_budget(result, dlogits, case)
    return result, dlogits
