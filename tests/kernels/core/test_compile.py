"""Tests of the operator under torch.compile, export, fake tensors and torch.func: equal to eager, no graph breaks."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.oracle import make_case
from sid_kernels import (
    CascadeWeights,
    fused_belief_head,
    fused_local_loss,
    local_loss_and_grad,
    refine_cascade,
)

LOCAL_LOSS = torch.ops.sid_kernels.local_loss.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def signature(rows=3, classes=5, *, device="cpu", need_grad=True, backend="auto", grad=True, **kinds):
    """Return arguments of the operator itself."""
    case = make_case(rows, classes, **kinds).to(device)
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    tensor = isinstance(case.alpha, torch.Tensor)
    return (
        case.logits.requires_grad_(grad), case.prior, case.target, case.alpha if tensor else None,
        0.0 if tensor else case.alpha, o["divergence"], o["label_smoothing"], o["ignore_index"], o["reduction"], backend,
        need_grad,
    )  # fmt: skip


SIGNATURES = {
    "labels": dict(),
    "labels, none, ignored": dict(reduction="none", ignored=0.4),
    "soft, sum, alpha by row": dict(soft=True, reduction="sum", alpha="rows"),
    "no prior, smoothing, alpha tensor": dict(prior=False, label_smoothing=0.1, alpha="scalar"),
    "reverse, soft, bfloat16, float32 prior": dict(
        divergence="reverse", soft=True, dtype=torch.bfloat16, prior_dtype=torch.float32
    ),
    "float64": dict(dtype=torch.float64),
    "one class": dict(classes=1),
    "without gradient": dict(need_grad=False, grad=False),
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_opcheck(backend, kind):
    kinds = dict(SIGNATURES[kind])
    if kinds.get("dtype") is torch.float64 and backend.name != "reference":
        kinds["dtype"] = torch.float16  # float64 is the reference backend's alone
    actual = torch.library.opcheck(LOCAL_LOSS, signature(device=backend.device, backend=backend.name, **kinds))
    expected = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert {actual[name] for name in expected} == {"SUCCESS"}, actual


def compiled_step(backend, **options):
    def step(z, q, y):
        result = fused_local_loss(z * 2.0, q, y, 0.4, backend=backend.name, **options)
        return (result.loss * 3.0).sum() + result.belief.sum() * 0.0, result

    return step


@pytest.mark.parametrize(
    "kinds",
    (
        dict(ignored=0.3),
        dict(soft=True, divergence="reverse", reduction="none"),
        dict(prior=False, dtype=torch.bfloat16),
    ),
    ids=("labels", "soft reverse", "bfloat16 without prior"),
)
def test_compiled_is_eager(backend, kinds):
    """Check that the loss and the operations around it compile to one graph (fullgraph=True)."""
    case = make_case(6, 21, **kinds).to(backend.device)
    step = compiled_step(backend, **case.options)
    z = case.logits.requires_grad_()
    outputs = []
    for f in (step, torch.compile(step, fullgraph=True)):
        loss, result = f(z, case.prior, case.target)
        (gradient,) = torch.autograd.grad(loss, z)
        outputs.append((loss, *result, gradient))
    for name, eager, compiled in zip(
        ("total", "loss", "belief", "fidelity", "consistency", "dz"), *outputs, strict=True
    ):
        torch.testing.assert_close(compiled, eager, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_gradient_in_hand(backend):
    case = make_case(6, 21).to(backend.device)

    def f(z, q, y):
        result, dlogits = local_loss_and_grad(z, q, y, backend=backend.name)
        return result.loss, dlogits * 2

    expected = f(case.logits, case.prior, case.target)
    actual = torch.compile(f, fullgraph=True)(case.logits, case.prior, case.target)
    torch.testing.assert_close(actual, expected)


def test_compiled_out(backend):
    case = make_case(6, 21).to(backend.device)

    def f(z, q, y, out):
        local_loss_and_grad(z, q, y, backend=backend.name, out=out)
        return out + 1

    out = torch.empty_like(case.logits)
    expected = local_loss_and_grad(case.logits, case.prior, case.target, backend=backend.name)[1]
    actual = torch.compile(f, fullgraph=True)(case.logits, case.prior, case.target, out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(actual, expected + 1)


def test_no_recompiling_for_each_batch_size(backend):
    """Check that the first size is static, the second makes the batch dynamic, and all others reuse that graph."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(compiled_step(backend), fullgraph=True, backend=count)
    for rows in (4, 7, 9, 33, 128):
        case = make_case(rows, 10).to(backend.device)
        z = case.logits.requires_grad_()
        loss, _ = step(z, case.prior, case.target)
        expected = compiled_step(backend)(z, case.prior, case.target)[0]
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert len(graphs) == 2, f"{len(graphs)} graphs for five batch sizes"


def test_graph_has_no_break_in_a_module(backend):
    layer = torch.nn.Linear(8, 10).to(backend.device)

    def f(x, q, y):
        logits = layer(x)
        loss, belief, *_ = fused_local_loss(logits, q, y, torch.full((), 0.5, device=x.device), backend=backend.name)
        return loss, fused_local_loss(layer(x), belief.detach(), y, backend=backend.name).loss

    x = torch.randn(4, 8, device=backend.device)
    explained = torch._dynamo.explain(f)(x, None, torch.zeros(4, dtype=torch.int64, device=backend.device))
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_fake_tensors(reduction):
    with FakeTensorMode():
        z = torch.empty(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)
        q = torch.empty(2, 3, 7)
        labels = torch.zeros(2, 3, dtype=torch.int64)
        result = fused_local_loss(z, q, labels, reduction=reduction)
        assert result.loss.shape == result.fidelity.shape == ((2, 3) if reduction == "none" else ())
        assert result.loss.dtype is torch.float32 and result.loss.requires_grad
        assert result.belief.shape == (2, 3, 7) and result.belief.dtype is torch.float32
        dlogits = local_loss_and_grad(z, q, labels)[1]
        assert dlogits.shape == z.shape and dlogits.dtype is torch.bfloat16
        result.loss.sum().backward()
        assert z.grad.shape == z.shape
        for bad, error, message in (
            (dict(prior=torch.empty(6)), ValueError, "prior has shape"),
            (dict(prior=0.5), TypeError, "prior is of type float"),
            (dict(target=[0, 1]), TypeError, "target is of type list"),
            (dict(alpha=2.0), ValueError, "alpha is 2.0"),
            (dict(alpha="a"), TypeError, "alpha is of type str"),
            (dict(reduction="max"), ValueError, "reduction is 'max'"),
            (dict(out=torch.empty(2, 3, 8)), ValueError, "out has shape"),
        ):
            with pytest.raises(error, match=message):
                local_loss_and_grad(**(dict(logits=z, prior=q, target=labels) | bad))


def test_make_fx(backend):
    case = make_case(4, 9).to(backend.device)

    def f(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(fused_local_loss(z, case.prior, case.target, backend=backend.name).loss, z)[0]

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(case.logits)
        assert LOCAL_LOSS in {node.target for node in graph.graph.nodes}, mode
        torch.testing.assert_close(graph(case.logits), f(case.logits))


class Belief(torch.nn.Module):
    def forward(self, z, q, y):
        return fused_local_loss(z, q, y).belief


def test_export():
    case = make_case(4, 9)
    rows = torch.export.Dim("rows", min=2, max=4096)
    arguments = (case.logits, case.prior, case.target)
    program = torch.export.export(Belief(), arguments, dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    other = make_case(17, 9, seed=1)
    actual = program.module()(other.logits, other.prior, other.target)
    assert torch.equal(actual, Belief()(other.logits, other.prior, other.target))


def test_torch_func(backend):
    case = make_case(4, 9, alpha="rows").to(backend.device)

    def loss(z):
        return fused_local_loss(z, case.prior, case.target, case.alpha, backend=backend.name).loss

    (expected, *_), dlogits = local_loss_and_grad(
        case.logits, case.prior, case.target, case.alpha, backend=backend.name
    )
    gradient, value = torch.func.grad_and_value(loss)(case.logits)
    assert torch.equal(gradient, dlogits) and torch.equal(value, expected)
    _, pullback = torch.func.vjp(loss, case.logits)
    torch.testing.assert_close(pullback(torch.tensor(2.0, device=backend.device))[0], 2 * dlogits)
    scaled = torch.func.grad(lambda z: loss(3 * z))(case.logits)
    at_three = local_loss_and_grad(3 * case.logits, case.prior, case.target, case.alpha, backend=backend.name)[1]
    torch.testing.assert_close(scaled, 3 * at_three)


def test_torch_func_refuses_what_it_cannot(backend):
    z = torch.randn(4, 9, device=backend.device)
    labels = torch.zeros(4, dtype=torch.int64, device=backend.device)

    def loss(z):
        return fused_local_loss(z, None, labels, backend=backend.name).loss

    with pytest.raises(RuntimeError, match="fused_local_loss has no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z).square().sum())(z)


def test_operator_refuses_a_second_derivative(backend):
    z, *rest = signature(backend=backend.name, device=backend.device)
    (first,) = torch.autograd.grad(LOCAL_LOSS(z, *rest)[0], z, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_local_loss has no second derivative"):
        torch.autograd.grad(first.square().sum() + z.sum(), z)


KINDS = {
    "loss": lambda z, alpha: fused_local_loss(z, None, z.new_zeros(4, dtype=torch.int64), alpha).loss,
    "loss and gradient": lambda z, alpha: local_loss_and_grad(z, None, z.new_zeros(4, dtype=torch.int64), alpha)[1],
    "head": lambda z, alpha: fused_belief_head(z, z + 1, None, None, z.new_zeros(4, dtype=torch.int64), alpha).loss,
    "cascade": lambda z, alpha: refine_cascade(z, weights_like(z), z.new_zeros(4, dtype=torch.int64), alpha).loss,
    "cascade, by stage": lambda z, alpha: (
        refine_cascade(z, weights_like(z), z.new_zeros(4, dtype=torch.int64), [alpha, alpha / 2]).loss
    ),
}


def weights_like(z):
    """Return the weights of two stages of three units and five classes over the features z."""
    shapes = ((2, 3, 5 + z.shape[1]), (2, 3), (2, 5, 3), (2, 5))
    return CascadeWeights(*(torch.linspace(-1, 1, math.prod(shape)).view(shape) for shape in shapes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_alpha_that_changes_compiles_once_more(kind):
    """Check that new numbers share a program; each one used to compile again, and the ninth gave up."""
    torch._dynamo.reset()
    counter, z = CompileCounter(), torch.linspace(-1, 1, 24).view(4, 6)
    compiled = torch.compile(KINDS[kind], fullgraph=True, backend=counter)
    for i in range(12):
        alpha = 0.1 + 0.05 * i
        torch.testing.assert_close(compiled(z, alpha), KINDS[kind](z, alpha))
    assert counter.frame_count <= 2
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="alpha"):
        compiled(z, 1.5)
