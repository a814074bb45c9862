"""Run the CUDA kernels on the host (tests/helpers/simt) and compare their results with the float64 reference.

Each case runs twice, with threads and blocks in opposite orders, and must give equal bits (simt_library.run).
"""

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import simt_library as simt
from helpers.oracle import Case, assert_within_budget, make_case, oracle

WHY_NOT = simt.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"CUDA sources cannot be compiled here: {WHY_NOT}")

PACK = {"f32": 4, "bf16": 8, "f16": 8, "any": 1}
HELD = {"f32": 8, "bf16": 8, "f16": 8, "any": 16}
DIVERGENCES = ("forward", "reverse")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the kernels once. If that fails, every test reports it without another attempt."""
    return simt.load()


def check(case, *arguments, **options) -> simt.Output:
    result = simt.run(case, *arguments, **options)
    assert_within_budget(result, result.dlogits, case)
    return result


VARIANTS = {
    "hard": dict(),
    "hard, smoothed, some ignored, alpha by row": dict(label_smoothing=0.1, ignored=0.4, alpha="rows"),
    "soft": dict(soft=True, reduction="sum"),
    "soft, smoothed, alpha on the device": dict(soft=True, label_smoothing=0.1, alpha="scalar"),
    "no prior": dict(prior=False, reduction="none"),
    "no prior, soft": dict(prior=False, soft=True, alpha=0.0),
    "no prior, smoothed": dict(prior=False, label_smoothing=0.2, alpha=1.0, reduction="sum"),
    "each row": dict(reduction="none", label_smoothing=0.05, ignored=0.3),
}


@pytest.mark.parametrize(
    "variant", list(VARIANTS)[1:4:2] if simt.ADDRESS_SANITIZER else VARIANTS
)  # two under AddressSanitizer
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", simt.KINDS)
def test_every_kernel(kind, divergence, variant):
    """Run each kernel with warps and clusters, rows that do and do not fit registers, edges, and all options."""
    options = dict(dtype=simt.KIND_DTYPES[kind], divergence=divergence, **VARIANTS[variant])
    if divergence == "reverse" and not options.get("soft"):
        options.setdefault("label_smoothing", 0.1)
    v, held = PACK[kind], HELD[kind]
    for lanes, classes in ((1, v), (2, 2 * held * v), (2, 5 * held * v), (16, 77), (32, 3 * 32 * held * v // 2 + 5)):
        check(make_case(5, classes, seed=lanes, **options), simt.plan(kind, lanes))
    for threads, cluster, classes in ((64, 1, 64 * held * v), (32, 2, 2 * 32 * held * v + 13), (32, 4, 999)):
        check(make_case(3, classes, seed=cluster, **options), simt.plan(kind, 0, threads=threads, cluster=cluster))


@pytest.mark.parametrize("kind", simt.KINDS)
def test_clusters(kind):
    for cluster in (1, 2, 4, 8):
        for divergence in DIVERGENCES:
            case = make_case(
                3, 2500, dtype=simt.KIND_DTYPES[kind], divergence=divergence, label_smoothing=0.1, seed=cluster
            )
            check(case, simt.plan(kind, 0, threads=64, cluster=cluster))
    check(make_case(2, 41000, dtype=simt.KIND_DTYPES[kind]), simt.plan(kind, 0, threads=512, cluster=8, blocks=1))


@pytest.mark.parametrize("kind", ("f32", "bf16", "f16"))
def test_every_misalignment(kind):
    """Start rows at each offset within 16 bytes, equal in all matrices; include rows without a whole pack."""
    v = PACK[kind]
    for shift in range(v):
        for classes in (1, 2, v - 1, v, v + 1, 3 * v + 3, 257):
            case = make_case(3, classes, dtype=simt.KIND_DTYPES[kind], label_smoothing=0.1, seed=shift)
            case.logits, case.prior = simt.copy_shifted(case.logits, shift), simt.copy_shifted(case.prior, shift)
            a, _ = simt.problem_of(case, None, True, shift)
            assert simt.choose_plan(a).kind == simt.KINDS.index(kind)
            check(case, shift=shift)
            check(case, simt.plan(kind, 0, threads=32, cluster=2), shift=shift)


@pytest.mark.parametrize("logits", simt.KIND_DTYPES.values())
@pytest.mark.parametrize("prior", (torch.float32, torch.float16))
def test_mixed_dtypes_and_strides(logits, prior):
    for soft in (torch.float32, torch.bfloat16, torch.float16):
        case = make_case(4, 53, dtype=logits, prior_dtype=prior, soft=True)
        case.target = case.target.to(soft)
        check(case)
    # Rows with gaps, rows that share memory, rows with different offsets in z and q.
    case = make_case(4, 53, dtype=logits, prior_dtype=prior)
    wide = torch.full((4, 64), torch.nan, dtype=logits)
    wide[:, :53] = case.logits
    check(Case(wide[:, :53], case.prior, case.target))
    check(Case(case.logits[:1].expand(4, -1), case.prior[:1].expand(4, -1), case.target))
    check(Case(case.logits, simt.copy_shifted(case.prior, 1), case.target))


@pytest.mark.parametrize("kind", simt.KINDS)
def test_out_may_be_the_logits(kind):
    for p in (simt.plan(kind, 16), simt.plan(kind, 0, threads=32, cluster=2)):
        for classes in (64, 1037):
            case = make_case(5, classes, dtype=simt.KIND_DTYPES[kind], label_smoothing=0.1, ignored=0.3)
            apart, alias = simt.run(case, p), simt.run(case, p, alias=True)
            for name, value in apart._asdict().items():
                assert simt.bits(value).equal(simt.bits(getattr(alias, name))), name


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("kind", simt.KINDS)
def test_incoming_gradient(kind, reduction):
    """Multiply dlogits by the incoming gradient before they are rounded; a factor of 1 does not write known ones."""
    dtype = simt.KIND_DTYPES[kind]
    for p in (simt.plan(kind, 16), simt.plan(kind, 0, threads=32, cluster=2)):
        case = make_case(5, 77, dtype=dtype, ignored=0.3, label_smoothing=0.1, reduction=reduction)
        exact = oracle(case).dlogits
        for incoming in (torch.tensor(0.37), torch.tensor([0.5, -3.0, 1.0, 1e-4, 7.0])):
            actual = simt.run(case, p, incoming=incoming, precomputed=True).dlogits
            expected = exact * (incoming.double() if incoming.dim() == 0 else incoming[:, None].double())
            assert torch.allclose(actual.double(), expected, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)
        untouched = simt.run(case, p, incoming=torch.tensor(1.0), precomputed=True)
        assert untouched.dlogits.isnan().all() and untouched.belief.isnan().all()


def test_no_gradient_wanted():
    case = make_case(5, 100, soft=True)
    with_gradient, without = simt.run(case), simt.run(case, need_grad=False)
    assert without.dlogits is None
    assert with_gradient.loss.equal(without.loss) and with_gradient.belief.equal(without.belief)


@pytest.mark.parametrize("kind", simt.KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_and_extreme_rows(kind, divergence):
    """Check masked classes with and without target mass, fully masked rows, NaN, large logits, and zero priors."""
    soft = torch.rand(9, 100).softmax(-1)
    soft[0, 7:90], soft[1, 40:] = 0.0, 0.0
    case = make_case(9, 100, dtype=simt.KIND_DTYPES[kind], divergence=divergence, reduction="none")
    z, q = case.logits, case.prior
    case.target = soft.to(z.dtype)
    z[0, 7:90], q[0, 7:90] = -torch.inf, 0.0  # masked classes
    z[1, 40:], q[1, 40:] = -torch.inf, 0.0
    if divergence == "forward":
        z[2, 3] = -torch.inf  # the target has mass here: infinite loss, finite gradient
    z[4] += 30000.0 if z.dtype is torch.float16 else 1e6
    z[5] *= 50.0
    q[6], q[6, 5] = 0.0, 1.0  # certain
    for p in (None, simt.plan(kind, 16), simt.plan(kind, 0, threads=32, cluster=4)):
        result = simt.run(case, p)
        assert_within_budget(result, result.dlogits, only_finite(case, result))
    z[3], z[7, 11], z[8, 99] = -torch.inf, torch.nan, torch.inf
    result = simt.run(case)
    for row in (3, 7, 8):
        assert result.loss[row].isnan() and result.belief[row].isnan().all(), row
    assert result.loss[[0, 1, 4, 5, 6]].isfinite().all()
    assert result.belief[[0, 1, 2, 4, 5, 6]].isfinite().all() and result.dlogits[[0, 1, 2, 4, 5, 6]].isfinite().all()


def only_finite(case, result):
    """Skip gradients that autograd cannot compute, after checking that the kernel's closed form is finite.

    These are the gradients of rows with infinite loss.
    """
    truth = oracle(case)
    bad = truth.dlogits.isnan().any(1)
    assert result.dlogits[bad].isfinite().all()
    result.dlogits[bad] = torch.nan
    return case


@pytest.mark.parametrize("kind", simt.KINDS)
def test_labels_out_of_range(kind):
    for bad in (-1, 100, -(2**40), 2**40):
        case = make_case(4, 100, dtype=simt.KIND_DTYPES[kind], reduction="none", label_smoothing=0.1)
        truth = simt.run(case)
        case.target[2] = bad
        result = simt.run(case)
        for x in (result.loss, result.fidelity, result.consistency, result.dlogits):
            assert x[2].isnan().all() and x[[0, 1, 3]].isfinite().all()
        assert result.belief.equal(truth.belief)
        case.options["reduction"] = "mean"
        assert simt.run(case).loss.isnan()
        case.options["ignore_index"] = bad
        check(case)


@pytest.mark.parametrize("reduction", simt.REDUCTIONS)
def test_few_rows_and_few_classes(reduction):
    for rows in (0, 1, 2, 33):
        for classes in (1, 2, 3, 10, 100):
            check(make_case(rows, classes, reduction=reduction))
    everything_ignored = make_case(6, 10, reduction=reduction, ignored=1.0)
    result = check(everything_ignored)
    assert not result.loss.any() and not result.dlogits.any()
    everything_ignored.logits[2, 2] = torch.nan
    assert not simt.run(everything_ignored).dlogits.any()


def test_counting_launch():
    """Count the labels of a mean in a launch of its own: above 4096 rows, or if the plan requests it."""
    case = make_case(4100, 2, ignored=0.5)
    before = simt.load().simt_launches()
    check(case, multiprocessors=16)
    assert simt.load().simt_launches() - before == 4  # two launches in each of two orders
    check(make_case(70, 9, ignored=0.5), simt.plan("any", 8, count_first=1))


def test_workspace_is_left_as_found():
    """Check that counts, tickets and partial sums of a launch do not affect the next one with the same workspace."""
    library = simt.load()
    workspace = torch.zeros(library.simt_workspace_bytes(), dtype=torch.uint8)
    plans = (
        simt.plan("any", 8, blocks=7, count_first=1),
        simt.plan("any", 32, blocks=1),
        simt.plan("any", 0, threads=32, blocks=3),
    )
    for rows, p in zip((70, 3, 40), plans, strict=True):
        case = make_case(rows, 60, ignored=0.3, seed=rows)
        a, result = simt.problem_of(case, None, True, 0)
        assert library.simt_local_loss(ctypes.byref(a), ctypes.byref(p), workspace.data_ptr()) is None
        assert_within_budget(result, result.dlogits, case)


def test_row_offsets_beyond_32_bits():
    """Place two rows 2^31 + 64 elements apart, in reserved memory that is not touched in between."""
    classes, stride = 40, 2**31 + 64
    size = 2 * (stride + classes)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # the value on Linux; Python defines the name from 3.13 on
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    whole = torch.frombuffer(memory, dtype=torch.bfloat16, count=size // 2)
    case = make_case(2, classes, dtype=torch.bfloat16)
    for name in ("logits", "prior"):
        apart = whole.as_strided((2, classes), (stride, 1))
        apart.copy_(getattr(case, name))
        far = Case(case.logits, case.prior, case.target)
        setattr(far, name, apart)
        check(far)
        check(far, simt.plan("any", 8))
    soft = Case(case.logits, case.prior, whole.as_strided((2, classes), (stride, 1)))
    check(soft)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_scale(dtype):
    for rows, classes, shift in ((1, 1, 0), (3, 5000, 0), (3, 5000, 1), (7, 33, 3), (40, 1000, 0)):
        x = simt.copy_shifted(torch.randn(rows, classes).to(dtype), shift)
        one = torch.tensor(0.37)
        expected = (x.float() * one).to(dtype)
        for target_shift in (shift, 0, 1):
            out = simt.like(x, dtype, target_shift)
            simt.scale(x, one, out)
            assert out.equal(expected)
        by_row = torch.rand(rows)
        by_row[0] = 1.0
        copy = simt.copy_shifted(x, shift)
        simt.scale(copy, by_row, copy)
        assert copy.equal((x.float() * by_row[:, None]).to(dtype))
        gaps = torch.full((rows, classes + 3), 9.0, dtype=dtype)
        gaps[:, :classes] = x
        simt.scale(gaps[:, :classes], one, gaps[:, :classes])
        assert gaps[:, :classes].equal(expected) and (gaps[:, classes:] == 9.0).all()


def test_scale_of_one_touches_nothing():
    nowhere = torch.empty(0).as_strided((0, 4), (4, 1))
    a = simt.Scale(2**20, 4, simt.rows_of(nowhere), simt.rows_of(nowhere), torch.ones(()).data_ptr(), 0)
    a.source.data = a.out.data = 16  # not a valid address
    one = torch.ones(())
    a.scale = one.data_ptr()
    assert simt.load().simt_scale(ctypes.byref(a)) is None


@pytest.mark.parametrize("clusters", (0, 1))
def test_the_plan(clusters):
    """Check that rows stay in registers if they can, that edges have a lane each, and that the grid fits."""
    matrix = torch.empty(1, 1)
    for dtype, kind in ((torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")):
        v, held = PACK[kind], HELD[kind]
        for rows in (1, 16, 128, 8192, 65536, 2**24):
            for classes in (1, 2, 4, 10, 100, 1000, 1024, 1025, 4096, 32000, 50257, 128256, 262144, 10**6):
                where = simt.Rows(matrix.data_ptr() // 64 * 64, classes, simt.DTYPES[dtype])
                a = simt.LocalLossProblem(rows, classes, where, where, simt.LossSpec(64))
                a.belief, a.dlogits, a.spec.options.reduction = where, where, simt.REDUCTIONS["mean"]
                p = simt.choose_plan(a, 132, clusters)
                assert p.kind == simt.KINDS.index(kind)
                for n in (p.lanes, p.threads, p.cluster):
                    assert n & (n - 1) == 0 and n > 0
                assert p.cluster <= (8 if clusters else 1) and p.blocks % p.cluster == 0 and 1 <= p.blocks <= 4096
                assert p.threads == 128 if p.warp else 64 <= p.threads <= 512
                threads = p.lanes * p.cluster
                on_chip = threads * held * v
                assert on_chip >= classes or (threads == 512 * (8 if clusters else 1))
                assert classes % v == 0 or threads >= 2 * (v - 1)  # one lane per edge element
                assert p.blocks * p.threads <= 132 * 512
                assert bool(p.count_first) == (rows > 4096)


def test_what_the_host_reports():
    """Check that the shim reports each kind of mistake in a kernel."""
    memory = torch.zeros(64)
    library = simt.load()
    library.simt_configure(2, 1, 0)
    for mistake, message in {
        1: r"a block's barrier at line \d+ was reached by 32 of 64 threads",
        2: r"a shuffle at line \d+ was reached by 31 of 32 threads",
        3: r"a shuffle at line \d+, by others at line \d+",
        4: r"a block's barrier at line \d+, by others at line \d+",
        5: r"a misaligned 16-byte access",
        6: r"no such shared memory in the cluster",
        7: r"a cluster's barrier at line \d+ was reached by 64 of 128 threads",
    }.items():
        said = library.simt_mistake(mistake, memory.data_ptr())
        assert said is not None and re.search(message, said.decode()), (mistake, said)
    assert library.simt_mistake(0, memory.data_ptr()) is None
    assert memory.equal((torch.arange(64) ^ 1).float())


@pytest.mark.slow
@pytest.mark.skipif(simt.ADDRESS_SANITIZER, reason="this is the run under AddressSanitizer")
def test_under_address_sanitizer():
    """Repeat the tests above in a process with AddressSanitizer."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("g++ has no AddressSanitizer runtime")
    simt.build(sanitize=True)  # build here: the compiler is slow with the runtime preloaded
    environment = os.environ | {
        "SID_SIMT_ASAN": "1",
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    chosen_tests = "every or mixed or may_be or out_of_range or scale or workspace"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", chosen_tests, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
    print(done.stdout.splitlines()[-1])
