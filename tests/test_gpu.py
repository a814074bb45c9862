"""What only a GPU can show: capture in CUDA graphs, streams, devices, no waiting, memory, real sizes, determinism.

The other files run on a GPU too, through the fixture `backend`; here is what has no counterpart on a CPU.
"""

import pytest
import torch

from conftest import Backend
from oracle import assert_within_budget, make_case
from sid_kernels import backends, fused_local_loss, local_loss_and_grad
from test_accuracy import run

pytestmark = pytest.mark.gpu


def _params():
    for name in ("cuda", "triton"):
        reason = backends.unavailable(name) if torch.cuda.is_available() else None  # without: the marker gpu skips
        yield pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else [])


@pytest.fixture(params=_params())
def kernel(request) -> str:
    return request.param


def needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory; {free:.1f} are free")


def on_gpu(rows, classes, device="cuda", **kinds):
    """make_case, its numbers drawn on the GPU where there are many."""
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


# ---- graphs, streams, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("rows,classes", ((128, 10), (64, 1000), (2, 100_003), (9000, 10)))
def test_graph_replays_with_another_alpha_and_other_inputs(kernel, rows, classes, reduction):
    case = on_gpu(rows, classes, alpha="scalar", ignored=0.2, reduction=reduction)
    out = torch.empty_like(case.logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(case, kernel, out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, kernel, out=out)
    for i, alpha in enumerate((0.0, 0.9, 0.25, 0.9)):
        case.alpha.fill_(alpha)
        case.logits.normal_()
        case.target.copy_(torch.randint(0, classes, (rows,), device="cuda"))
        case.target[: 1 + i] = -100  # another number of rows counts
        graph.replay()
        torch.cuda.synchronize()
        assert equal_bits(captured, call(case, kernel)), alpha


def test_graph_of_a_training_step(kernel):
    """Forward, backward with a scaled loss and the update, captured together."""
    layer = torch.nn.Linear(20, 50).cuda()
    x = torch.randn(16, 20, device="cuda")
    labels = torch.randint(0, 50, (16,), device="cuda")
    alpha = torch.tensor(0.5, device="cuda")

    def step():
        layer.zero_grad(set_to_none=True)
        (fused_local_loss(layer(x), None, labels, alpha, backend=kernel).loss * 3).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = layer.weight.grad
    for value in (0.1, 0.8):
        alpha.fill_(value)
        x.normal_()
        graph.replay()
        found = captured.clone()
        step()
        torch.testing.assert_close(found, layer.weight.grad)


def test_graphs_replayed_side_by_side(kernel):
    """Two graphs on two streams share no workspace."""
    graphs, outputs, expected, streams = [], [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for seed in (0, 1):
        case = on_gpu(2000, 1000, seed=seed)
        expected.append(call(case, kernel))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(call(case, kernel))
        graphs.append((graph, case))
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _case), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert equal_bits(outputs[0], expected[0]) and equal_bits(outputs[1], expected[1])


def test_runs_on_the_current_stream(kernel):
    """Behind a long wait on that stream: a kernel launched elsewhere would read what is not there yet."""
    case = on_gpu(256, 1000)
    expected = call(case, kernel)
    late = torch.zeros_like(case.logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(case.logits)
        case.logits = late.requires_grad_()
        found = call(case, kernel)
        loss = fused_local_loss(case.logits, case.prior, case.target, backend=kernel).loss
        (gradient,) = torch.autograd.grad(2 * loss, late)
        torch.cuda._sleep(200_000_000)
        late.detach().fill_(torch.nan)
    stream.synchronize()
    assert equal_bits(found, expected)
    torch.testing.assert_close(gradient, 2 * expected[4])


def test_on_another_device(kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only, so the second device index is not tried")
    case = on_gpu(64, 1000)
    expected = call(case, kernel)
    assert torch.cuda.current_device() == 0
    found = call(case.to("cuda:1"), kernel)
    assert {x.device.index for x in found} == {1} and torch.cuda.current_device() == 0
    assert equal_bits([x.cpu() for x in found], [x.cpu() for x in expected])


# ---- no waiting, no bad access, debugging ----------------------------------------------------------------------------


@pytest.fixture
def synchronisation_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rows,classes", ((128, 10), (9000, 10), (64, 1000), (2, 262_144)))
def test_nothing_waits_for_the_gpu(kernel, rows, classes, synchronisation_is_an_error):
    cases = [on_gpu(rows, classes, alpha="scalar", ignored=0.2), on_gpu(rows, classes, soft=True, alpha="rows")]

    def everything():
        for case in cases:
            for reduction in ("mean", "none"):
                call(case, kernel, reduction=reduction)
                z = case.logits.detach().requires_grad_()
                loss = fused_local_loss(
                    z, case.prior, case.target, case.alpha, reduction=reduction, backend=kernel
                ).loss
                (loss.sum() * 0.5).backward(retain_graph=True)
                loss.sum().backward()

    everything()  # compiles and reserves memory
    torch.cuda.synchronize()
    synchronisation_is_an_error()
    everything()


@pytest.mark.parametrize("classes", (10, 1000, 40_000))
@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_label_out_of_range_is_nan_in_its_row(kernel, classes, reduction, monkeypatch):
    monkeypatch.delenv("SID_KERNELS_DEBUG", raising=False)
    case = on_gpu(6, classes, reduction=reduction)
    expected = call(case, kernel)
    case.target[[1, 3, 4]] = torch.tensor([classes, -1, 2**40], device="cuda")
    found = call(case, kernel)
    bad = torch.tensor([False, True, False, True, True, False], device="cuda")
    assert torch.equal(found[1], expected[1]), "the belief knows no label"
    assert found[4][bad].isnan().all() and torch.equal(found[4][~bad], expected[4][~bad])
    for value, before in ((found[0], expected[0]), (found[2], expected[2])):
        assert value.isnan().all() if reduction == "sum" else torch.equal(value.isnan(), bad)
        assert reduction == "sum" or torch.equal(value[~bad], before[~bad])


def test_debug_raises(kernel, monkeypatch):
    monkeypatch.setenv("SID_KERNELS_DEBUG", "1")
    case = on_gpu(4, 10)
    call(case, kernel)
    case.target[2] = 10
    with pytest.raises(IndexError, match=r"target has label 10 in row 2; it must be in \[0, 10\)"):
        call(case, kernel)
    case.target[2] = 0
    case.alpha = torch.tensor(1.5, device="cuda")
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must lie in \[0, 1\]"):
        call(case, kernel)


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
    assert peak(step) <= 2 * matrix + small, "the scaled gradient was not written in place"


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
