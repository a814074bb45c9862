"""Tests of `fused_belief_head`: values against float64, priors, chunks, memory, autograd, compilation, bad input.

The loss of the logits is held to account elsewhere (oracle.py); here the layer under it is. The rule is the same: no
further from float64 than PyTorch in the same dtype, plus a few roundings of what a result is summed from.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.head_oracle import OPTIONS, PRIORS, RESULTS, SIZES, Problem, assert_within_budget
from sid_kernels import BeliefHead, PriorHead, belief_head_and_grad, fused_belief_head, fused_local_loss
from sid_kernels.belief_head import dispatch as head


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """Run all rows in one chunk, or in two because memory is seven classes short."""
    if request.param == "chunks":
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 2000)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numbers(sizes, options, prior, backend, chunks):
    problem = Problem(*sizes, prior=prior, **options)
    assert_within_budget(problem.run(backend=backend), problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_dtypes(options, prior, dtype, chunks):
    problem = Problem(70, 33, 10, dtype=dtype, prior=prior, **options)
    actual = problem.run()
    assert actual["hidden"].dtype == actual["weight"].dtype == dtype and actual["loss"].dtype != torch.bfloat16
    assert_within_budget(actual, problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_are_summed_in_float32(dtype, monkeypatch):
    """Check sums of more chunks than ROUNDINGS: in bfloat16 they would drift, and in float16 they might overflow."""
    problem = Problem(2000, 16, 10, dtype=dtype)
    problem.target[:] = 3  # gradients of one sign, so that the sums grow
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 10 * 20 * 10)
    assert_within_budget(problem.run(), problem)


def test_equal_bits_run_to_run_and_without_the_belief(chunks):
    problem = Problem(70, 33, 100, prior="head")
    first, again, without = problem.run(), problem.run(), problem.run(return_belief=False)
    assert without["belief"] is None
    for name in RESULTS:
        assert torch.equal(first[name], again[name]), name
        assert name == "belief" or torch.equal(first[name], without[name]), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("prior", PRIORS)
def test_through_autograd(prior, reduction, chunks):
    """Check that gradients equal those of the unfused layers for any incoming gradient of the rows."""
    problem = Problem(40, 12, 20, prior=prior, ignored=3)
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = fused_belief_head(*inputs, problem.prior, problem.target, 0.3, **options).loss
    given = None if prior == "none" else problem.given
    other = fused_local_loss(F.linear(*plain), given, problem.target, 0.3, **options).loss
    weight = torch.rand(loss.shape)
    (loss * weight).sum().backward()
    (other * weight).sum().backward()
    assert torch.allclose(loss, other, rtol=1e-5)
    for actual, expected in zip(inputs, plain, strict=True):
        assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_only_what_requires_a_gradient_gets_one():
    problem = Problem(9, 7, 5)
    bias = problem.bias.clone().requires_grad_()
    fused_belief_head(problem.hidden, problem.weight, bias, None, problem.target).loss.backward()
    assert bias.grad.abs().sum() > 0 and problem.weight.grad is None
    with torch.no_grad():
        assert not fused_belief_head(problem.hidden, problem.weight, bias, None, problem.target).loss.requires_grad


def test_backward_twice_and_no_second_derivative():
    problem = Problem(9, 7, 5)
    for reduction in ("mean", "none"):
        weight = problem.weight.clone().requires_grad_()
        loss = fused_belief_head(problem.hidden, weight, None, None, problem.target, reduction=reduction).loss.sum()
        loss.backward(retain_graph=True)
        once = weight.grad.clone()
        loss.backward()
        assert torch.allclose(weight.grad, 2 * once)
        loss = fused_belief_head(problem.hidden, weight, None, None, problem.target, reduction=reduction).loss.sum()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="fused_belief_head has no second derivative"):
            gradient.sum().backward()


def test_gradcheck_of_the_definition():
    problem = Problem(4, 3, 5, dtype=torch.float64, prior="head")
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    for reduction in ("mean", "none"):

        def f(*x, reduction=reduction):
            return fused_belief_head(*x, problem.prior, problem.target, 0.3, reduction=reduction).loss

        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operator_and_compiled_whole(reduction):
    problem = Problem(20, 6, 50, prior="head")
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    arguments = (*inputs, None, *problem.head, problem.target, None, 0.5, "forward", 0.0, -100, reduction)
    torch.library.opcheck(torch.ops.sid_kernels.belief_head.default, (*arguments, True, True, True, True, "auto", None))

    def form(hidden, weight, bias):
        result = fused_belief_head(
            hidden, weight, bias, problem.prior, problem.target, 0.3, reduction=reduction, return_belief=False
        )
        return 2.0 * result.loss.mean()

    expected, actual = form(*inputs), torch.compile(form, fullgraph=True)(*inputs)
    assert torch.allclose(expected, actual, rtol=1e-6)
    gradients = [torch.autograd.grad(x, inputs) for x in (expected, actual)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_under_autocast_as_a_linear_layer():
    problem = Problem(30, 12, 20, prior="head")
    weight = problem.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = fused_belief_head(problem.hidden, weight, problem.bias, problem.prior, problem.target, 0.3)
    assert result.loss.dtype is torch.float32 and result.belief.dtype is torch.bfloat16
    result.loss.backward()
    exact = problem.run(reduction="mean")
    assert weight.grad.dtype is torch.float32
    assert torch.allclose(weight.grad, exact["weight"], atol=0.03 * exact["weight"].abs().max().item())


def test_under_autocast_after_a_layer_that_is():
    """Test the usual case: hidden is in autocast's dtype, and the parameters of the head are not."""
    layer, last = torch.nn.Linear(8, 12), BeliefHead(12, 5)
    target = torch.randint(0, 5, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        result = last(layer(torch.randn(9, 8)), None, target)
    result.loss.backward()
    assert layer.weight.grad.dtype is torch.float32 and last.weight.grad.abs().sum() > 0


def test_float16_sums_stay_in_range(monkeypatch):
    """Check that the factor of a mean applies before sums of 10^5 and more, which end as a gradient of 8, overflow."""
    rows = 60_000
    hidden = torch.linspace(4, 12, rows).half().view(rows, 1)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 2 * 50 * 20_000)
    target = torch.zeros(rows, dtype=torch.int64)
    _, gradients = belief_head_and_grad(hidden, torch.zeros(50, 1).half(), None, None, target, 1.0)
    assert abs(float(gradients.weight[0]) + 8 * 0.98) < 0.05


def test_the_belief_of_a_half_precision_prior_head_is_what_the_operator_says():
    problem = Problem(9, 7, 5, dtype=torch.bfloat16, prior="head", divergence="reverse", label_smoothing=0.1)
    actual = problem.run()["belief"].dtype
    compiled = torch.compile(problem.run, fullgraph=True, backend="eager")()["belief"].dtype
    assert actual is compiled is torch.float32


def test_leading_dimensions_and_strided_rows():
    problem = Problem(24, 12, 20)
    flat = problem.run()
    wide = torch.randn(2, 12, 30)
    wide[..., :12] = problem.hidden.view(2, 12, 12)
    result, gradients = belief_head_and_grad(
        wide[..., :12], problem.weight, problem.bias, problem.prior.view(2, 12, 20), problem.target.view(2, 12), 0.3
    )
    assert result.belief.shape == (2, 12, 20) and gradients.hidden.shape == (2, 12, 12)
    assert torch.allclose(gradients.hidden.view(24, 12), flat["hidden"]) and torch.allclose(result.loss, flat["loss"])


def test_no_rows_and_all_rows_ignored():
    for problem in (Problem(0, 7, 5), Problem(9, 7, 5, ignored=9), Problem(0, 7, 5, prior="head")):
        actual = problem.run()
        assert actual["loss"] == 0 and actual["belief"].shape == (len(problem.hidden), 5)
        assert all((actual[name] == 0).all() for name in ("hidden", "weight", "bias"))


def test_at_most_a_chunk_of_logits_is_alive(allocated):
    """Check that 32,000 classes take at most 64 MiB beside inputs and gradients; all logits would take 250 MiB."""
    rows, width, classes = 2048, 16, 32000
    hidden, other = torch.randn(rows, width), torch.randn(rows, width)
    weight, teacher = torch.randn(classes, width), torch.randn(classes, width)
    target = torch.randint(0, classes, (rows,))
    returned = 4 * (rows * width + classes * width)
    for prior in (None, PriorHead(other, teacher)):
        most = allocated(
            lambda prior=prior: belief_head_and_grad(hidden, weight, None, prior, target, return_belief=False)
        )
        assert most - returned <= 64 << 20
    unfused = allocated(
        lambda: fused_local_loss(F.linear(hidden, weight.requires_grad_()), None, target).loss.backward()
    )
    assert unfused >= 750e6 * 0.9


def test_module_is_a_linear_layer_with_a_loss():
    teacher, student = BeliefHead(8, 30), BeliefHead(6, 30)
    x, y, target = torch.randn(12, 8), torch.randn(12, 6), torch.randint(0, 30, (12,))
    result = student(y, teacher.as_prior(x), target, alpha=0.25, return_belief=False)
    result.loss.backward()
    expected = fused_local_loss(student.logits(y), teacher.logits(x).softmax(-1), target, 0.25)
    assert torch.allclose(result.loss, expected.loss) and result.belief is None
    assert teacher.weight.grad is None and student.weight.grad.abs().sum() > 0
    assert list(student.state_dict()) == ["weight", "bias"]
    student.load_state_dict(torch.nn.Linear(6, 30).state_dict())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_in_hand_under_a_mode_and_compiled(reduction):
    """Check that tensors without an address take the operator: fake ones get shapes, and compiled code gets values."""
    problem = Problem(20, 6, 50, prior="head", reduction=reduction)
    expected = problem.run()
    actual = torch.compile(problem.run, fullgraph=True)()
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-6) for name in RESULTS)
    with FakeTensorMode() as mode:
        for name in ("hidden", "weight", "bias", "target"):
            setattr(problem, name, mode.from_tensor(getattr(problem, name)))
        problem.prior = PriorHead(*map(mode.from_tensor, problem.prior))
        actual = problem.run()
    assert all(
        actual[name].shape == expected[name].shape and actual[name].dtype == expected[name].dtype for name in RESULTS
    )


BAD = [
    ({"hidden": torch.zeros(9, 6)}, ValueError, r"weight has shape \(5, 7\).* H = 6"),
    ({"hidden": torch.zeros(9, 7, dtype=torch.int64)}, TypeError, "hidden has dtype torch.int64"),
    ({"hidden": "h"}, TypeError, "hidden is of type str"),
    ({"weight": torch.zeros(5, 7).half()}, TypeError, "weight has dtype torch.float16; it must be hidden's"),
    ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\); it must be \(C,\) = \(5,\)"),
    ({"prior": torch.zeros(9, 4)}, ValueError, r"prior has shape \(9, 4\); it must be \(..., C\) = \(9, 5\)"),
    ({"prior": (torch.zeros(9, 3),)}, TypeError, "prior is a tuple of 1"),
    ({"prior": (torch.zeros(9, 3), torch.zeros(4, 3))}, ValueError, "prior.weight has 4 classes"),
    ({"prior": (torch.zeros(8, 3), torch.zeros(5, 3))}, ValueError, r"prior.hidden has shape \(8, 3\)"),
    ({"prior": (torch.zeros(9, 3), torch.zeros(5, 2))}, ValueError, r"prior.weight has shape \(5, 2\)"),
    ({"target": torch.zeros(8, dtype=torch.int64)}, ValueError, "target has shape"),
    ({"target": torch.tensor([0] * 8 + [5])}, IndexError, "target has label 5 in row 8"),
    ({"alpha": -0.1}, ValueError, "alpha is -0.1"),
    ({"alpha": torch.full((9,), 2.0)}, ValueError, "alpha is 2.0"),
    ({"divergence": "both"}, ValueError, "divergence is 'both'"),
    ({"divergence": "reverse"}, ValueError, "full support"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    ({"backend": "triton"}, (ValueError, RuntimeError), "triton"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_named(change, error, message):
    good = {
        "hidden": torch.zeros(9, 7), "weight": torch.zeros(5, 7), "bias": torch.zeros(5), "prior": None,
        "target": torch.zeros(9, dtype=torch.int64),
    }  # fmt: skip
    fused_belief_head(**good)
    with pytest.raises(error, match=message):
        fused_belief_head(**(good | change))
