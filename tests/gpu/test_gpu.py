"""Test what only a GPU can show: CUDA graphs, streams, devices, no waiting, labels out of range, debugging.

The other files run on a GPU, too, through the fixture `backend`; these tests have no counterpart on a CPU.
"""

import pytest
import torch

from helpers.gpu_cases import call, equal_bits, on_gpu
from sid_kernels import fused_local_loss

pytestmark = pytest.mark.gpu


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
    """Capture the forward pass, the backward pass of a scaled loss, and the update together."""
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
        actual = captured.clone()
        step()
        torch.testing.assert_close(actual, layer.weight.grad)


def test_graphs_replayed_side_by_side(kernel):
    """Check that two graphs on two streams share no workspace."""
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
    """Wait on the current stream first: a kernel on another one would read values before they are written."""
    case = on_gpu(256, 1000)
    expected = call(case, kernel)
    late = torch.zeros_like(case.logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(case.logits)
        case.logits = late.requires_grad_()
        actual = call(case, kernel)
        loss = fused_local_loss(case.logits, case.prior, case.target, backend=kernel).loss
        (gradient,) = torch.autograd.grad(2 * loss, late)
        torch.cuda._sleep(200_000_000)
        late.detach().fill_(torch.nan)
    stream.synchronize()
    assert equal_bits(actual, expected)
    torch.testing.assert_close(gradient, 2 * expected[4])


def test_on_another_device(kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only, so the second device index is not tried")
    case = on_gpu(64, 1000)
    expected = call(case, kernel)
    assert torch.cuda.current_device() == 0
    actual = call(case.to("cuda:1"), kernel)
    assert {x.device.index for x in actual} == {1} and torch.cuda.current_device() == 0
    assert equal_bits([x.cpu() for x in actual], [x.cpu() for x in expected])


# ---- no waiting, no bad access, debugging ----------------------------------------------------------------------------


@pytest.fixture
def synchronization_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rows,classes", ((128, 10), (9000, 10), (64, 1000), (2, 262_144)))
def test_nothing_waits_for_the_gpu(kernel, rows, classes, synchronization_is_an_error):
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
    synchronization_is_an_error()
    everything()


@pytest.mark.parametrize("classes", (10, 1000, 40_000))
@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_label_out_of_range_is_nan_in_its_row(kernel, classes, reduction, monkeypatch):
    monkeypatch.delenv("SID_KERNELS_DEBUG", raising=False)
    case = on_gpu(6, classes, reduction=reduction)
    expected = call(case, kernel)
    case.target[[1, 3, 4]] = torch.tensor([classes, -1, 2**40], device="cuda")
    actual = call(case, kernel)
    bad = torch.tensor([False, True, False, True, True, False], device="cuda")
    assert torch.equal(actual[1], expected[1]), "the belief knows no label"
    assert actual[4][bad].isnan().all() and torch.equal(actual[4][~bad], expected[4][~bad])
    for value, before in ((actual[0], expected[0]), (actual[2], expected[2])):
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
