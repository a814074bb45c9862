"""Tests of the CPU backend: instruction sets, threads, forks, the interpreter lock, streaming stores, huge strides."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.huge import lazily_reserved
from helpers.oracle import assert_within_budget, make_case
from helpers.processes import fresh_process
from sid_kernels import LocalLoss, fused_local_loss, local_loss_and_grad
from sid_kernels.core import backends
from sid_kernels.core.options import LossOptions
from sid_kernels.local_loss import dispatch
from sid_kernels.local_loss.problem import make_problem

_missing = backends.unavailable("cpu")
pytestmark = pytest.mark.skipif(_missing is not None, reason=f"backend cpu: {_missing}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(case, **more):
    result, dlogits = local_loss_and_grad(
        case.logits, case.prior, case.target, case.alpha, backend="cpu", **case.options, **more
    )
    return (*result, dlogits)


def equal_bits(one, other):
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(flat, one), map(flat, other), strict=True)
    )


def flat(x):
    return x.contiguous().view(-1)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(threads):
    threads(2)


# ---- instruction sets ------------------------------------------------------------------------------------------------

ALL_KINDS = """
    import itertools, torch
    from helpers.oracle import assert_within_budget, make_case
    from sid_kernels import local_loss_and_grad
    from sid_kernels import core
    from sid_kernels.local_loss import cpu
    from helpers.without_belief import problem
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, prior, soft, divergence, classes in itertools.product(
        dtypes, (*dtypes, None), (True, False), ("forward", "reverse"), (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 1024, 1029)
    ):
        case = make_case(3, classes, dtype=dtype, prior=prior is not None, prior_dtype=prior, soft=soft, ignored=0.2,
                         divergence=divergence, label_smoothing=0.1, alpha="rows")
        result, dlogits = local_loss_and_grad(
            case.logits, case.prior, case.target, case.alpha, backend="cpu", **case.options)
        assert_within_budget(result, dlogits, case)
        assert torch.equal(cpu.run(problem(case, need_belief=False)).dlogits, dlogits)
    # every value of the half types, as logits against a row of zeros, as prior and as the belief that is written
    for dtype in dtypes[1:]:
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        z = torch.stack((every, torch.zeros_like(every)), 1)
        (_, belief, *_), dz = local_loss_and_grad(z, z.float().softmax(1), torch.zeros(65536, dtype=torch.int64),
                                                  backend="cpu", reduction="none")
        expected = z.double().softmax(1)
        assert torch.equal(belief.isnan(), expected.isnan())
        assert (belief.double() - expected).nan_to_num().abs().max() < 3e-7
        magnitude = every[every.isfinite() & (every >= 0)]
        q = torch.stack((magnitude, torch.ones_like(magnitude)), 1)
        zeros = torch.zeros(len(q), 2)
        result, dz = local_loss_and_grad(zeros, q, torch.zeros(len(q), dtype=torch.int64), 0.0, backend="cpu", reduction="none")
        wanted = q.double().sum(1, keepdim=True) / 2 - q.double()  # S p - q: shows a widened prior as it is
        assert ((dz.double() - wanted).abs() <= 2e-7 * q.double().sum(1, keepdim=True)).all()
        half = torch.linspace(-110, 0, 60001)  # down to what underflows: subnormal halves and zeros, and ties
        z = torch.stack((half, torch.zeros_like(half)), 1)
        (_, got, *_), _ = local_loss_and_grad(z, torch.zeros(len(z), 2, dtype=dtype), torch.zeros(len(z), dtype=torch.int64), backend="cpu")
        (_, exact, *_), _ = local_loss_and_grad(z, None, torch.zeros(len(z), dtype=torch.int64), backend="cpu")
        assert torch.equal(got, exact.to(dtype)), "the stored belief is not float32's rounded to nearest even"
    for classes in (700, 2100, 20000):  # whole blocks of masked classes, then logits far below 0
        z = torch.randn(2, classes) - 300
        z[:, : classes // 2] = -torch.inf
        (_, belief, *_), dz = local_loss_and_grad(z, None, torch.full((2,), classes - 1), 1.0, backend="cpu")
        expected = z.double().softmax(1)
        assert (belief.double() - expected).abs().max() < 1e-6
        expected[:, -1] -= 1
        assert (dz.double() - expected / 2).abs().max() < 1e-6
    print(core.cpu.instruction_set())
"""


@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow), "avx512"])
def test_every_instruction_set(level):
    highest = fresh_process("from sid_kernels.core import cpu; print(cpu.instruction_set())")
    order = ("baseline", "avx2", "avx512")
    if order.index(level) > order.index(highest):
        pytest.skip(f"this processor has no {level}; its best is {highest}")
    assert fresh_process(ALL_KINDS, SID_KERNELS_CPU=level) == level


def test_unknown_instruction_set_is_the_baseline():
    code = "from sid_kernels.core import cpu; print(cpu.instruction_set())"
    assert fresh_process(code, SID_KERNELS_CPU="nonsense") == "baseline"


# ---- threads, forks, the interpreter lock ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ("forward", "reverse"))
def test_equal_bits_for_any_number_of_threads(threads, divergence, dtype):
    for rows, classes in ((4099, 10), (67, 1031), (3, 40000)):
        case = make_case(rows, classes, dtype=dtype, divergence=divergence, label_smoothing=0.1, ignored=0.1)
        threads(1)
        expected = call(case)
        for number in (1, 2, 3, 5, 16):
            threads(number)
            assert equal_bits(call(case), expected), number


def test_from_other_threads_at_once(threads):
    """Call from several threads: each has its own scratch memory, and large calls release the interpreter lock."""
    threads(2)
    cases = [make_case(rows, 1031, seed=rows, dtype=DTYPES[rows % 3]) for rows in (3, 40, 65, 100)] * 3
    expected = [call(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(call, cases), expected, strict=True):
            assert equal_bits(actual, wanted)


def test_the_lock_is_let_go(threads):
    """Run Python in another thread during a call: it sees the gradient's first row written, the last one not yet."""
    threads(1)
    case = make_case(4000, 2000, soft=True, divergence="reverse")
    out = torch.empty(4000, 2000)
    gradient, seen, done = out.numpy(), threading.Event(), threading.Event()

    def work():
        try:
            for _ in range(1000):  # on a busy machine, the other thread may not run during some calls
                out.fill_(7.0)
                call(case, out=out)
                if seen.is_set():
                    break
        finally:
            done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        if gradient[0, 0] != 7.0 and gradient[-1, -1] == 7.0:
            seen.set()
    worker.join()
    assert seen.is_set(), "no Python ran during a call: the lock was held"


# Bytes are compared: PyTorch's own threads, which torch.equal would use, do not survive a fork.
FORK = """
    import os, torch
    from helpers.oracle import make_case
    from sid_kernels import local_loss_and_grad
    torch.set_num_threads(2)
    case = make_case(200, 1000)
    def call():
        return local_loss_and_grad(case.logits, case.prior, case.target, backend="cpu")[1].numpy().tobytes()
    expected = call()  # starts the threads that the child will not have
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(0 if call() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child's gradient differs"
        assert call() == expected
    print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_computes():
    assert fresh_process(FORK) == "ok"


LOADER = """
    import torch
    from helpers.oracle import make_case
    from sid_kernels import local_loss_and_grad
    from torch.utils.data import DataLoader, Dataset
    torch.set_num_threads(2)
    case = make_case(200, 1000)
    def call():
        return local_loss_and_grad(case.logits, case.prior, case.target, backend="cpu")[0].loss.item()
    class Losses(Dataset):
        def __len__(self):
            return 6
        def __getitem__(self, i):
            return call()
    if __name__ == "__main__":
        expected = call()
        found = torch.cat(list(DataLoader(Losses(), num_workers=2, multiprocessing_context="fork")))
        assert (found == expected).all(), found
        print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_workers_of_a_data_loader_compute():
    assert fresh_process(LOADER) == "ok"


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype,prior_dtype", ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)))
@pytest.mark.parametrize("classes", (10, 1000, 1031))
def test_streaming_stores_give_equal_bits(classes, dtype, prior_dtype):
    """Compare rows of outputs that bypass the caches (16 MiB and more) or use large pages (32 MiB and more)."""
    rows = (40 << 20) // (classes * 6) + 3
    case = make_case(rows, classes, dtype=dtype, prior_dtype=prior_dtype, reduction="none")
    whole = call(case)
    wide = torch.zeros(rows, classes + 3, dtype=dtype)[:, 1 : classes + 1]  # not aligned as the belief
    assert equal_bits(call(case, out=wide), whole)
    picked = torch.cat((torch.arange(40), torch.arange(rows - 40, rows), torch.randint(0, rows, (20,))))
    few = make_case(1, classes, reduction="none")
    few.logits, few.prior, few.target = case.logits[picked], case.prior[picked], case.target[picked]
    assert equal_bits(call(few), [x[picked] for x in whole])
    actual = call(few)
    assert_within_budget(LocalLoss(*actual[:4]), actual[4], few)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("divergence", ("forward", "reverse"))
@pytest.mark.parametrize("classes", (10, 1000, 1031))
def test_streaming_stores_without_a_belief(classes, divergence):
    """Check that the gradient decides about streaming without a belief: aligned, not aligned, and over the logits."""
    rows = (33 << 20) // (classes * 4) + 3
    case = make_case(rows, classes, divergence=divergence, label_smoothing=0.1)
    expected = call(case)[-1]
    aside = torch.zeros(rows, classes + 3)[:, 1 : classes + 1]
    for out in (None, aside, case.logits):
        options = LossOptions(**case.options)
        problem = make_problem(case.logits, case.prior, case.target, case.alpha, options, out=out, need_belief=False)
        assert torch.equal(dispatch.run(problem, "cpu").dlogits, expected)


@pytest.mark.parametrize("which", ("logits", "prior", "target", "out"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_beyond_two_to_the_31(which, dtype):
    """Use row offsets that need 64 bits; the memory between the rows is reserved and never accessed."""
    case = make_case(4, 37, dtype=dtype, soft=True)
    expected = call(case)
    tensor = case.logits if which == "out" else getattr(case, which)
    with lazily_reserved(4, 37, 2**30 + 5, dtype) as far:  # the last row begins past 3 * 2^30 elements
        if which == "out":
            assert equal_bits(call(case, out=far), expected)
            return
        far.copy_(tensor)
        setattr(case, which, far)
        assert equal_bits(call(case), expected)


def test_caller_memory_is_released():
    """Check that a call leaves no memory behind."""
    import gc
    import weakref

    case = make_case(4, 10)
    seen = [weakref.ref(x) for x in (case.logits, case.prior, case.target)]
    fused_local_loss(case.logits.requires_grad_(), case.prior, case.target).loss.backward()
    del case
    gc.collect()
    assert [x() for x in seen] == [None] * 3
