"""Test the cascade and the belief head on a GPU: numbers, graphs, launches, no waiting, memory."""

import pytest
import torch

from helpers.cascade_oracle import assert_within_budget, make_case
from helpers.head_oracle import Problem
from helpers.head_oracle import assert_within_budget as head_within_budget
from sid_kernels import CascadeWeights, PriorHead, belief_head_and_grad, refine_cascade_and_grad
from sid_trainer import SIDNetwork, StackedHeads, sid_step

pytestmark = pytest.mark.gpu


def on_gpu(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, tuple):
        return type(x)(*map(on_gpu, x))
    return x


def run_cascade(case, backend="auto"):
    result, dfeatures, gradients = refine_cascade_and_grad(
        on_gpu(case.features), on_gpu(case.weights), on_gpu(case.target), case.alpha, prior=on_gpu(case.prior),
        backend=backend, **case.options,
    )  # fmt: skip
    actual = result._asdict() | {"features": dfeatures} | gradients._asdict()
    return {name: x.cpu() for name, x in actual.items()}


@pytest.fixture(autouse=True)
def ieee_products():
    """Disable TF32, which would round the products' factors to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("options", [{}, {"soft": True, "alpha": "stages"}, {"ignored": 4, "prior": True},
                                     {"divergence": "reverse", "label_smoothing": 0.1}], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(10, 128, 256, 128, 10), (4, 130, 64, 16, 100), (2, 33, 40, 7, 1000)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
def test_cascade(sizes, options, backend):
    case = make_case(*sizes, **options)
    assert_within_budget(run_cascade(case, backend), case)


def test_cascade_in_bfloat16_is_near_float32():
    half = make_case(5, 128, 256, 64, 10, dtype=torch.bfloat16)
    full = make_case(5, 128, 256, 64, 10)
    full = full.__class__(half.features.float(), CascadeWeights(*(x.float() for x in half.weights)), half.target)
    actual, expected = run_cascade(half), run_cascade(full)
    for name in ("stage_loss", "features", *CascadeWeights._fields):
        assert (actual[name].float() - expected[name]).norm() <= 0.03 * expected[name].norm(), name


def make_step(depth=10, classes=10, rows=128):
    torch.manual_seed(0)
    heads = StackedHeads(depth, 128, classes).cuda()
    weights, gradients = heads.weights, CascadeWeights(*(torch.empty_like(x) for x in heads.weights))
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3, fused=True, capturable=True)
    features, target = torch.randn(rows, 128, device="cuda"), torch.randint(0, classes, (rows,), device="cuda")

    def step():
        result, _, _ = refine_cascade_and_grad(features, weights, target, 0.5, out=gradients)
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return result

    return step, features, target, weights, gradients


def test_a_cascade_step_is_a_handful_of_launches():
    step, *_ = make_step()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"{len(launched)} launches:", *launched, sep="\n  ")
    assert 0 < len(launched) <= 18  # 16 on an H200; cuBLAS takes one or two for a product


def test_a_cascade_step_waits_for_nothing_and_replays():
    step, features, target, weights, written = make_step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = [x.detach().clone() for x in weights]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(2):
        features.normal_()
        target.random_(10)
        for x, value in zip(weights, before, strict=True):
            x.data.copy_(value)
        graph.replay()
        actual = [result.stage_loss.clone(), *(g.clone() for g in written)]
        again, _, gradients = refine_cascade_and_grad(features, CascadeWeights(*before), target, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(actual, (again.stage_loss, *gradients), strict=True))


def test_the_trainers_step_on_another_stream():
    torch.manual_seed(0)
    results = []
    for side in (False, True):
        torch.manual_seed(0)
        network = SIDNetwork(torch.nn.Linear(20, 32), StackedHeads(4, 32, 10), 10).cuda()
        x, y = torch.randn(64, 20, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = sid_step(network, x, y).stage_loss
        torch.cuda.synchronize()
        results.append([losses, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("prior", ["none", "tensor", "head"])
@pytest.mark.parametrize("options", [{}, {"soft": True, "alpha": "rows"}, {"ignored": 3, "reduction": "none"},
                                     {"divergence": "reverse", "label_smoothing": 0.1}], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(130, 64, 10), (70, 33, 100), (300, 40, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head(sizes, options, prior, dtype):
    problem = Problem(*sizes, prior=prior, dtype=dtype, **options)
    result, gradients = belief_head_and_grad(
        *map(on_gpu, (problem.hidden, problem.weight, problem.bias, problem.prior, problem.target, problem.alpha)),
        **problem.options,
    )  # fmt: skip
    actual = {name: x.cpu() for name, x in (result._asdict() | gradients._asdict()).items()}
    head_within_budget(actual, problem)


def test_head_holds_a_chunk_and_waits_for_nothing():
    rows, width, classes = 8192, 256, 50_257
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    hidden, weight, other, teacher = make(rows, width), make(classes, width), make(rows, width), make(classes, width)
    target = torch.randint(0, classes, (rows,), device="cuda")

    def call():
        return belief_head_and_grad(hidden, weight, None, PriorHead(other, teacher), target, return_belief=False)

    call()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, gradients = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = torch.cuda.max_memory_allocated() - start - sum(x.nbytes for x in gradients if x is not None)
    assert held <= (256 + 128) << 20, f"{held / 2**20:.0f} MiB beyond inputs and gradients"
    assert result.loss.isfinite()
