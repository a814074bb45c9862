"""Test the belief head and the cascade on sizes and options that hypothesis draws, and on every instruction set."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws these cases and is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cascade_oracle, head_oracle
from helpers.processes import fresh_process
from sid_kernels.belief_head import dispatch as head
from sid_kernels.cascade import dispatch as cascade

OPTIONS = dict(
    soft=st.booleans(),
    divergence=st.sampled_from(("forward", "reverse")),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    ignored=st.sampled_from((0, 1, 3)),
    ignore_index=st.sampled_from((-100, -1)),
    seed=st.integers(0, 10_000),
)


def settled(soft, divergence, label_smoothing, ignored, ignore_index, rows):
    if divergence == "reverse" and not soft and label_smoothing == 0.0:
        label_smoothing = 0.1  # the divergence is infinite without
    return dict(
        soft=soft, divergence=divergence, label_smoothing=label_smoothing, ignored=min(ignored, rows),
        ignore_index=ignore_index,
    )  # fmt: skip


@settings(max_examples=120)
@given(
    stages=st.integers(1, 4), rows=st.integers(0, 40), width=st.integers(1, 40), dim=st.integers(1, 20),
    classes=st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 257))), prior=st.booleans(),
    alpha=st.sampled_from((0.0, 1.0, 0.5, "stages")), reduction=st.sampled_from(("mean", "sum")),
    group=st.sampled_from((1, 20_000, cascade.GROUP_BYTES)), **OPTIONS,
)  # fmt: skip
def test_cascades(stages, rows, width, dim, classes, prior, alpha, reduction, group, seed, **kinds):
    before, cascade.GROUP_BYTES = cascade.GROUP_BYTES, group
    try:
        case = cascade_oracle.make_case(
            stages, rows, width, dim, classes, prior=prior, alpha=alpha, reduction=reduction, seed=seed,
            **settled(rows=rows, **kinds),
        )  # fmt: skip
        cascade_oracle.assert_within_budget(cascade_oracle.run(case), case)
    finally:
        cascade.GROUP_BYTES = before


@settings(max_examples=120)
@given(
    rows=st.integers(0, 40), width=st.integers(1, 40),
    classes=st.one_of(st.integers(1, 40), st.sampled_from((129, 1000, 1025))),
    prior=st.sampled_from(head_oracle.PRIORS), alpha=st.sampled_from((0.0, 1.0, 0.5, "rows")), bias=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "none")), chunk=st.sampled_from((1, 3000, head.CHUNK_BYTES["cpu"])),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)), **OPTIONS,
)  # fmt: skip
def test_heads(rows, width, classes, prior, alpha, bias, reduction, chunk, dtype, seed, **kinds):
    before, head.CHUNK_BYTES["cpu"] = head.CHUNK_BYTES["cpu"], chunk
    try:
        problem = head_oracle.Problem(
            rows, width, classes, dtype=dtype, prior=prior, alpha=alpha, bias=bias, reduction=reduction, seed=seed,
            **settled(rows=rows, **kinds),
        )  # fmt: skip
        head_oracle.assert_within_budget(problem.run(), problem)
    finally:
        head.CHUNK_BYTES["cpu"] = before


ON_ANY = """
    from helpers.cascade_oracle import OPTIONS, SIZES, assert_within_budget, make_case, run
    from sid_kernels.core import cpu
    for sizes in [*SIZES[:5], (2, 17, 9, 3, 16), (2, 8, 9, 3, 8), (2, 5, 4, 3, 33)]:
        for options in OPTIONS:
            case = make_case(*sizes, **options)
            assert_within_budget(run(case), case)
    print(cpu.instruction_set())
"""


@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow)])
def test_the_cascade_on_every_instruction_set(level):
    """Run the CPU cascade on each instruction set; the other tests run on the processor's best."""
    order = ("baseline", "avx2", "avx512")
    highest = fresh_process("from sid_kernels.core import cpu; print(cpu.instruction_set())")
    if order.index(level) > order.index(highest):
        pytest.skip(f"this processor has no {level}; its best is {highest}")
    assert fresh_process(ON_ANY, SID_KERNELS_CPU=level) == level
