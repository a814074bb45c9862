"""Every Triton kernel compiled ahead of time for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942, without a GPU.

The binaries must not spill. By default a covering set of variants is compiled; SID_TEST_SLOW=1 takes the full
product of plans and flags for each dtype (about 9,200 compilations, two hours on two cores).
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")
from sid_kernels.core.triton import INTERPRETING, scale_tiles
from sid_kernels.local_loss import triton_launch as triton_kernels

if INTERPRETING:
    pytest.skip("TRITON_INTERPRET=1: this process interprets, it cannot compile", allow_module_level=True)

from helpers import triton_variants as tv

# Bytes of shared memory a program may have: of sm_86 and sm_89, the least of those from sm_80 on, and of gfx942.
SHARED = {"sm": 99 * 1024, "gf": 64 * 1024}


def compile_all(variants, targets, cache) -> list[tv.Compiled]:
    """Two processes; fresh ones, because a process that holds torch's threads should not be forked."""
    jobs = [(variant, target) for target in targets for variant in variants]
    old = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(tv.compile_variant, jobs, chunksize=2))
    finally:
        if old is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = old


def check(compiled: list[tv.Compiled]) -> None:
    bad = [c for c in compiled if c.spills or c.stack or c.shared > SHARED[c.target[:2]]]
    assert not bad, "\n".join(map(str, bad))
    assert not [c for c in compiled if c.truncates]


def test_the_covering_set_covers():
    """Each dtype meets each plan with the belief and without, and each flag in both values; so does each plan."""
    variants = tv.covering_set()
    for flag in tv.FLAGS:
        for dtype in tv.DTYPES:
            assert {dict(v.constants)[flag] for v in variants if dict(v.pointers)["logits"] == dtype} == {True, False}
    blocks = {
        (v.kernel, dict(v.constants)["BLOCK_C"], dict(v.pointers)["logits"], dict(v.constants)["NEED_BELIEF"])
        for v in variants
    }
    assert len(blocks) == len(variants) == 6 * len(triton_kernels.PLANS)
    loops = [dict(v.constants) for v in variants if v.kernel == "local_loss_loop"]
    assert any(not c["NEED_GRAD"] and not c["NEED_BELIEF"] for c in loops)  # one sweep
    assert {v.aligned for v in variants} == {True, False}


@pytest.mark.parametrize("target", tv.TARGETS)
def test_no_spills(target, tmp_path):
    variants = tv.covering_set() + tv.other_variants()
    compiled = compile_all(variants, [target], tmp_path)
    expected = 6 * len(triton_kernels.PLANS) + 2 + 2 * len(tv.DTYPES) * len(scale_tiles())
    assert len(compiled) == expected
    check(compiled)


@pytest.mark.parametrize("kernel", ("cascade", "head"))
@pytest.mark.parametrize("target", tv.TARGETS)
def test_no_spills_in_products(target, kernel, tmp_path):
    """The cascade and the belief head: every plan of theirs, at sizes of models."""
    variants = (tv.cascade_set if kernel == "cascade" else tv.head_set)(nvidia=target != "gfx942")
    assert len(set(variants)) == 2 * len(tv.CASCADES if kernel == "cascade" else tv.HEADS)
    if target == "sm_100":  # these tiles compile as for sm_90: each size in one of its two dtypes will do
        variants = [v for i, v in enumerate(variants) if i % 4 in (0, 3)]
    check(compile_all(variants, [target], tmp_path))


def test_rows_use_wide_accesses(tmp_path):
    """Where sizes allow, z, q, p and dz move 16 bytes at a time: as many accesses as one thread's elements need."""
    plan = triton_kernels.plan_for(4096)
    variants = [tv.local_loss_variant(plan, (True,) * len(tv.FLAGS), d, d, d, True) for d in tv.DTYPES]
    for c, size in zip(compile_all(variants, ["sm_90"], tmp_path), (4, 2, 2), strict=True):
        assert c.vector_accesses == 4 * plan.block // (32 * plan.warps) * size // 16


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SID_TEST_SLOW") != "1", reason="two hours of compiling; set SID_TEST_SLOW=1")
@pytest.mark.parametrize("dtype", tv.DTYPES)
@pytest.mark.parametrize("target", tv.TARGETS)
def test_no_spills_in_the_full_product(target, dtype, tmp_path):
    variants = tv.full_product(dtype, dtype, dtype, aligned=True)
    assert len(variants) == 64 * len(triton_kernels.PLANS)
    check(compile_all(variants, [target], tmp_path))
