"""Calls of the local loss on a case of `oracle.py`."""

import torch

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


def assert_same(found, expected, backend):
    """Assert equal bits on a CPU; on a GPU, where sums follow the alignment of rows, equality up to roundings."""
    for got, want in zip(found, expected, strict=True):
        if backend.device == "cpu":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=max(1e-5, 2 * torch.finfo(want.dtype).eps), atol=1e-7)
