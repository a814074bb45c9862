"""Test the Triton kernels without a belief under the interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch

from helpers.grids import INTERPRETED_DTYPES
from helpers.oracle import make_case
from helpers.without_belief import DIVERGENCES, PRIORS, SIZES, TARGETS, assert_equal_except_belief, problem
from sid_kernels.core.triton import INTERPRETING
from sid_kernels.local_loss import triton_kernels as triton_rows
from sid_kernels.local_loss import triton_launch as triton_kernels
from sid_kernels.local_loss.triton_launch import LossPlan

assert INTERPRETING, "run through test_triton_interpreter.py"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LOOPS = (LossPlan(37, 1, 16, 1, (64, 64, 64), looped=True), LossPlan(2**62, 1, 2048, 1, (64, 64, 64), looped=True))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ("tile", "loop"))
def test_every_kind(monkeypatch, kernel, dtype, divergence, target, prior):
    if kernel == "loop":
        monkeypatch.setattr(triton_kernels, "PLANS", LOOPS)
    for (rows, classes), reduction in zip(SIZES, ("mean", "sum", "none", "mean", "none"), strict=True):
        if kernel == "loop":  # one row per program; the interpreter is slow
            rows = min(rows, 2)
        case = make_case(
            rows, classes, dtype=dtype, divergence=divergence, reduction=reduction, alpha="rows", seed=classes,
            **TARGETS[target], **PRIORS[prior],
        )  # fmt: skip
        beside = triton_kernels.run(problem(case))
        assert_equal_except_belief(triton_kernels.run(problem(case, need_belief=False)), beside)
        loss_alone = triton_kernels.run(problem(case, need_grad=False, need_belief=False))
        assert_equal_except_belief(loss_alone, beside._replace(dlogits=None))
        over = triton_kernels.run(problem(case, out=case.logits, need_belief=False))
        assert over.dlogits.data_ptr() == case.logits.data_ptr()
        assert_equal_except_belief(over, beside)


def test_no_rows():
    result = triton_kernels.run(problem(make_case(0, 10), need_belief=False))
    assert result.belief is None and result.loss == 0 and result.dlogits.shape == (0, 10)


def test_the_loop_reads_once_where_nothing_is_emitted(monkeypatch):
    """Check that the loss alone takes one sweep: it loads the chunks of the row, and the one that is loaded ahead."""
    monkeypatch.setattr(triton_kernels, "PLANS", LOOPS)
    loads, load_tiles = [], triton_rows.load_tiles
    monkeypatch.setattr(triton_rows, "load_tiles", lambda *a, **k: (loads.append(1), load_tiles(*a, **k))[1])
    triton_kernels.run(problem(make_case(1, 37), need_grad=False, need_belief=False))
    assert len(loads) == 3 + 1
    triton_kernels.run(problem(make_case(1, 37), need_belief=False))
    assert len(loads) == 3 + 1 + 3 + 1 + 3


def test_nothing_is_allocated_for_the_belief(monkeypatch):
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kinds: (sizes.append(size), empty(*size, **kinds))[1])
    case = make_case(3, 37, reduction="none")
    triton_kernels.run(problem(case, out=case.logits, need_belief=False))
    assert (3, 37) not in sizes
