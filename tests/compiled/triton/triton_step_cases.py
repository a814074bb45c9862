"""Test the public operations over the Triton kernels, including the gradients of weights and features.

Run under the interpreter by test_triton_interpreter.py; pytest does not collect this file by itself.
"""

import pytest

from helpers import cascade_oracle as cascades
from helpers import head_oracle as heads
from helpers.cascade_oracle import assert_within_budget, make_case
from sid_kernels.belief_head import triton_launch as triton_head
from sid_kernels.cascade import dispatch as cascade
from sid_kernels.cascade import triton_launch as triton_cascade


@pytest.fixture
def called(monkeypatch):
    """Count how often the kernels ran: a problem that quietly took another path would prove nothing."""
    count = []
    for module in (triton_cascade, triton_head):
        run = module.run
        monkeypatch.setattr(module, "run", lambda problem, run=run: (count.append(1), run(problem))[1])
    return count


@pytest.mark.parametrize("options", cascades.OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(3, 9, 7, 5, 4), (2, 20, 16, 6, 10)], ids=str)
def test_cascade(sizes, options, called):
    case = make_case(*sizes, **options)
    assert_within_budget(cascades.run(case, "triton"), case)
    assert len(called) == 1


def test_cascade_in_groups(called, monkeypatch):
    monkeypatch.setattr(cascade, "GROUP_BYTES", 1)
    case = make_case(3, 9, 7, 5, 4)
    assert_within_budget(cascades.run(case, "triton"), case)
    assert len(called) == 3


@pytest.mark.parametrize("prior", heads.PRIORS)
@pytest.mark.parametrize("options", [*heads.OPTIONS, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("sizes", [(9, 7, 5), (20, 33, 10)], ids=str)
def test_head(sizes, options, prior, called):
    problem = heads.Problem(*sizes, prior=prior, **options)
    heads.assert_within_budget(problem.run(backend="triton"), problem)
    assert len(called) == (0 if prior == "head" else 1)  # a prior that is a head is computed in chunks
