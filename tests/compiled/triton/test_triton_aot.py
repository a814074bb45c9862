"""Compile every Triton kernel ahead of time, without a GPU: no binary may spill registers or use a stack.

A covering set of variants is compiled for NVIDIA sm_80 and sm_90; sm_100, AMD gfx942 and float16 are marked `slow`. The
full product of plans and flags for each dtype (about 9,200 compilations, two hours on two cores) is marked `exhaustive`.
Binaries stay in build/triton, Triton's own cache, until a kernel, an option or the compiler changes.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

from sid_kernels.belief_head import triton_kernels as head_kernels
from sid_kernels.cascade import triton_kernels as cascade_kernels
from sid_kernels.core import triton_math
from sid_kernels.core.triton import INTERPRETING, scale_tiles
from sid_kernels.local_loss import triton_kernels as loss_kernels
from sid_kernels.local_loss import triton_launch as triton_kernels

if INTERPRETING:
    pytest.skip("TRITON_INTERPRET=1: this process interprets, it cannot compile", allow_module_level=True)

from helpers import triton_variants as tv

pytestmark = pytest.mark.aot

CACHE = Path(__file__).parents[3] / "build/triton"
TARGETS = [pytest.param(name, marks=[] if name in ("sm_80", "sm_90") else [pytest.mark.slow]) for name in tv.TARGETS]
DTYPES = [pytest.param(name, marks=[pytest.mark.slow] if name == "fp16" else []) for name in tv.DTYPES]
# Bytes of shared memory a program may have: of sm_86 and sm_89, the least of those from sm_80 on, and of gfx942.
SHARED = {"sm": 99 * 1024, "gf": 64 * 1024}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))


def check(variants: list[tv.Variant], target: str) -> None:
    compiled = [tv.compile_variant(variant, target) for variant in variants]
    bad = [c for c in compiled if c.stack or c.shared > SHARED[target[:2]]]
    assert not bad, "\n".join(map(str, bad))
    assert not [c for c in compiled if c.truncates]


def test_the_covering_set_covers():
    """Check that each dtype meets each plan with and without the belief, and that dtypes and plans meet all flags."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(target, dtype):
    """Compile the local loss: the variants of the covering set whose logits have this dtype."""
    variants = [v for v in tv.covering_set() if dict(v.pointers)["logits"] == dtype]
    assert len(variants) == 2 * len(triton_kernels.PLANS)
    check(variants, target)


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_in_small_kernels(target):
    variants = tv.other_variants()
    assert len(variants) == 2 + 2 * len(tv.DTYPES) * len(scale_tiles())
    check(variants, target)


@pytest.mark.parametrize("kernel", ("cascade", "head"))
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_in_products(target, kernel):
    """Compile the cascade and the belief head with each of their plans, at sizes of models."""
    variants = (tv.cascade_set if kernel == "cascade" else tv.head_set)(nvidia=target != "gfx942")
    assert len(set(variants)) == 2 * len(tv.CASCADES if kernel == "cascade" else tv.HEADS)
    if target == "sm_100":  # these tiles compile as for sm_90, so each size in one of its two dtypes is enough
        variants = [v for i, v in enumerate(variants) if i % 4 in (0, 3)]
    check(variants, target)


MODULES = (triton_math, loss_kernels, cascade_kernels, head_kernels)
KERNELS = {
    f"{module.__name__}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if isinstance(function, triton.JITFunction)
}


@pytest.mark.parametrize("name", KERNELS)
def test_globals_of_a_kernel_equal_themselves(name):
    """Check that no global is NaN: Triton compares globals before a launch, and NaN differs from itself."""
    kernel = KERNELS[name]
    assert kernel.cache_key
    assert not [key for key, (value, scope) in kernel.used_global_vals.items() if scope[key[0]] != value]


def test_rows_use_wide_accesses():
    """Check that z, q, p and dz move 16 bytes at a time if sizes allow, with no more accesses than needed."""
    plan = triton_kernels.plan_for(4096)
    for dtype, size in zip(tv.DTYPES, (4, 2, 2), strict=True):
        variant = tv.local_loss_variant(plan, (True,) * len(tv.FLAGS), dtype, dtype, dtype, True)
        compiled = tv.compile_variant(variant, "sm_90")
        assert compiled.vector_accesses == 4 * plan.block // (32 * plan.warps) * size // 16


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", tv.DTYPES)
@pytest.mark.parametrize("target", tv.TARGETS)
def test_no_spills_in_the_full_product(target, dtype):
    variants = tv.full_product(dtype, dtype, dtype, aligned=True)
    assert len(variants) == 64 * len(triton_kernels.PLANS)
    check(variants, target)
