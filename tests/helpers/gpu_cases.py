"""Make cases for tests that only a GPU can run: numbers drawn on the GPU, calls, comparisons, memory needed."""

import pytest
import torch

from helpers.oracle import make_case
from sid_kernels import local_loss_and_grad


def needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory; {free:.1f} are free")


def on_gpu(rows, classes, device="cuda", **kinds):
    """Return a case as `make_case` does, with its numbers drawn on the GPU if there are many."""
    if rows * classes < 2**20:
        return make_case(rows, classes, **kinds).to(device)
    case = make_case(rows, 1, **kinds).to(device)
    torch.manual_seed(rows)
    case.logits = (torch.randn(rows, classes, device=device) * 3).to(case.logits.dtype)
    if case.prior is not None:
        case.prior = torch.randn(rows, classes, device=device).mul_(2).softmax(-1).to(case.prior.dtype)
    if case.target.is_floating_point():
        case.target = torch.randn(rows, classes, device=device).mul_(2).softmax(-1).to(case.target.dtype)
    else:
        ignored = case.target < 0
        case.target = torch.randint(0, classes, (rows,), device=device).masked_fill_(ignored, -100)
    return case


def call(case, kernel, **more):
    result, dlogits = local_loss_and_grad(
        case.logits, case.prior, case.target, case.alpha, backend=kernel, **(case.options | more)
    )
    return (*result, dlogits)


def equal_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
