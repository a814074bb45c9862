"""Test real sizes on a GPU: error budget, borders of the launch plans, determinism, memory, huge strides."""

import pytest
import torch

from helpers.backends import Backend
from helpers.gpu_cases import call, equal_bits, needs_memory, on_gpu
from helpers.local_loss import run
from helpers.oracle import assert_within_budget, make_case
from sid_kernels import fused_local_loss
from sid_kernels.core import backends
from sid_kernels.local_loss import triton_launch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Give memory back after each test, because other processes may test on this GPU at the same time."""
    yield
    torch.cuda.empty_cache()


def test_auto_takes_a_compiled_kernel():
    expected = next((name for name in ("cuda", "triton") if backends.unavailable(name) is None), None)
    assert expected is not None, "neither cuda nor triton kernels run on this GPU"
    assert backends.automatic("cuda") == expected


SIZES = ((65536, 1000), (2048, 32000), (512, 50257), (8, 262144), (1, 262144), (65536, 10), (300000, 3))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rows,classes", SIZES)
def test_real_sizes_within_budget(kernel, rows, classes, dtype):
    needs_memory(30 if rows * classes > 2**24 else 4)
    kinds = [dict(ignored=0.1), dict(soft=True, divergence="reverse")]
    for kind in kinds:
        case = on_gpu(rows, classes, dtype=dtype, **kind)
        first = call(case, kernel)
        result = fused_local_loss(case.logits, case.prior, case.target, backend=kernel, **case.options)
        assert_within_budget(result, first[4], case)
        assert equal_bits(call(case, kernel), first), "two runs differ"


@pytest.mark.parametrize(
    "classes", (1, 2, 3, 8, 31, 64, 65, 127, 128, 129, 257, 1536, 3073, 6145, 8191, 16385, 32769, 65537)
)
def test_sizes_about_the_borders_of_the_plans(kernel, classes):
    for dtype in (torch.float32, torch.float16):
        for kind in (dict(ignored=0.2, label_smoothing=0.1), dict(soft=True, divergence="reverse", prior=False)):
            run(make_case(5, classes, dtype=dtype, alpha="rows", **kind), Backend(kernel, "cuda"))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows,classes", ((4096, 1000), (256, 50257), (4, 262_144)))
def test_no_memory_beside_belief_and_gradient(kernel, rows, classes):
    case = on_gpu(rows, classes, dtype=torch.bfloat16, ignored=0.2)
    z = case.logits.requires_grad_()
    small = 2**20 + 64 * rows  # losses, partial sums, rounding up to blocks

    def peak(f):
        f()
        z.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = f()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        del kept
        z.grad = None
        return used

    def step():
        result = fused_local_loss(z, case.prior, case.target, backend=kernel)
        (2 * result.loss).backward()
        return result

    matrix = z.numel() * z.element_size()
    out = torch.empty_like(case.logits)
    assert peak(lambda: call(case, kernel)) <= 2 * matrix + small
    assert peak(lambda: call(case, kernel, out=out)) <= matrix + small
    wide = triton_launch.WIDE_BYTES if kernel == "triton" else 0  # a block of the gradient before it is rounded
    assert peak(step) <= 2 * matrix + small + wide, "the scaled gradient was not written in place"


def test_gradient_is_scaled_in_place_unless_the_graph_is_kept(kernel):
    case = on_gpu(64, 1000)
    z = case.logits.requires_grad_()
    dlogits = call(case, kernel)[4]
    for scale in (1.0, 3.0):
        loss = fused_local_loss(z, case.prior, case.target, backend=kernel).loss
        (saved,) = loss.grad_fn.saved_tensors
        (kept,) = torch.autograd.grad(loss * scale, z, retain_graph=True)
        assert torch.equal(saved, dlogits)
        torch.testing.assert_close(kept, dlogits * scale)
        (last,) = torch.autograd.grad(loss * scale, z)
        assert last.data_ptr() == saved.data_ptr()
        torch.testing.assert_close(last, dlogits * scale)


@pytest.mark.parametrize("which", ("logits", "prior", "target", "out"))
def test_offsets_beyond_two_to_the_31(kernel, which):
    needs_memory(10)
    case = on_gpu(4, 1000, dtype=torch.bfloat16, soft=True)
    expected = call(case, kernel)
    stride = 2**30 + 8
    far = torch.empty(3 * stride + 1000, dtype=torch.bfloat16, device="cuda").as_strided((4, 1000), (stride, 1))
    if which == "out":
        assert equal_bits(call(case, kernel, out=far), expected)
    else:
        setattr(case, which, far.copy_(getattr(case, which)))
        assert equal_bits(call(case, kernel), expected)
