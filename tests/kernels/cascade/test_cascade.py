"""Tests of `refine_cascade`: values against single stages in float64, determinism, memory, options."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.cascade_oracle import NAMES, OPTIONS, SIZES, Case, assert_within_budget, make_case, run, truth
from sid_kernels import CascadeWeights, fused_local_loss, refine_cascade, refine_cascade_and_grad
from sid_kernels.cascade import cpu as cascade_cpu
from sid_kernels.cascade import dispatch as cascade
from sid_kernels.cascade.problem import make_problem
from sid_kernels.core.options import LossOptions


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numbers(sizes, options, backend):
    case = make_case(*sizes, **options)
    assert_within_budget(run(case, backend), case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_dtypes_go_stage_by_stage(options, dtype):
    case = make_case(3, 30, 24, 8, 10, dtype=dtype, **options)
    actual = run(case)
    if dtype.itemsize == 2:  # beliefs between stages stay in float32: nearer to float64 than a chain in the dtype
        expected = truth(case)
        for name in NAMES:
            error = (actual[name].double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= 40 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"
    else:
        assert_within_budget(actual, case)


def test_rows_as_in_a_step_of_the_reference_network():
    case = make_case(10, 128, 256, 128, 10)
    assert_within_budget(run(case), case)


@pytest.mark.parametrize("classes", [10, 37])
def test_equal_bits_run_to_run_and_for_any_number_of_threads(classes):
    case = make_case(4, 150, 40, 12, classes)
    before = torch.get_num_threads()
    try:
        along = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            along.append(run(case))
        for other in along[1:]:  # what the kernel computes; the products are PyTorch's
            for name in ("stage_loss", "fidelity", "consistency", "belief", "logits"):
                assert torch.equal(along[0][name], other[name]), name
        for name in NAMES:
            assert torch.equal(along[1][name], along[3][name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_groups_of_stages_change_nothing(options, monkeypatch):
    case = make_case(5, 40, 24, 8, 10, **options)
    whole = run(case)
    for size in (1, 40 * 2 * 34 * 4 * 2):  # one stage at a time, two at a time
        monkeypatch.setattr(cascade, "GROUP_BYTES", size)
        parts = run(case)
        assert_within_budget(parts, case)
        for name in ("stage_loss", "belief", "logits"):
            assert torch.allclose(parts[name], whole[name], rtol=2e-5, atol=1e-6), name


def test_through_autograd_and_scaled():
    case = make_case(4, 33, 24, 8, 10, prior=True)
    direct = run(case)
    inputs = [x.clone().requires_grad_() for x in (case.features, *case.weights)]
    for factor in (1.0, 0.25):
        result = refine_cascade(
            inputs[0], CascadeWeights(*inputs[1:]), case.target, case.alpha, prior=case.prior, **case.options
        )
        assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
        gradients = torch.autograd.grad(result.loss * factor, inputs)
        for name, actual in zip(("features", *CascadeWeights._fields), gradients, strict=True):
            assert torch.allclose(actual, factor * direct[name], rtol=1e-6), name


def test_only_what_requires_a_gradient_gets_one():
    case = make_case(2, 9, 7, 5, 4)
    weights = CascadeWeights(*(x.clone() for x in case.weights))
    weights.logits_bias.requires_grad_()
    refine_cascade(case.features, weights, case.target).loss.backward()
    assert torch.allclose(weights.logits_bias.grad, run(case)["logits_bias"])
    assert weights.hidden_weight.grad is None and case.features.grad is None
    with torch.no_grad():
        assert not refine_cascade(case.features, weights, case.target).loss.requires_grad


def test_gradcheck_of_the_definition():
    case = make_case(2, 4, 3, 3, 3, dtype=torch.float64, prior=True)
    inputs = [x.clone().requires_grad_() for x in (case.features, *case.weights)]

    def last_stage(features, *weights):
        """Check a single stage: with more, finite differences would move the priors between them, the constants."""
        one = CascadeWeights(*(x[:1] for x in weights))
        return refine_cascade(features, one, case.target, 0.3, prior=case.prior).loss

    assert torch.autograd.gradcheck(last_stage, inputs)


def test_second_derivative_is_refused():
    case = make_case(2, 4, 3, 3, 3)
    weights = CascadeWeights(*(x.requires_grad_() for x in case.weights))
    loss = refine_cascade(case.features, weights, case.target).loss
    (gradient,) = torch.autograd.grad(loss, [weights.logits_bias], create_graph=True)
    with pytest.raises(RuntimeError, match="refine_cascade has no second derivative"):
        gradient.sum().backward()


def test_operator():
    case = make_case(3, 9, 7, 5, 4, prior=True)
    inputs = [x.requires_grad_() for x in (case.features, *case.weights)]
    for prior, alpha, values in ((case.prior, None, [0.1, 0.2, 0.3]), (None, torch.tensor(0.3), [])):
        arguments = (*inputs, case.target, prior, alpha, values, "forward", 0.0, -100, "mean", "auto", True)
        torch.library.opcheck(torch.ops.sid_kernels.cascade.default, arguments)


def test_compiled_whole_equals_eager():
    case = make_case(3, 20, 16, 8, 10, alpha="stages")

    def gradients(f):
        inputs = [x.clone().requires_grad_() for x in (case.features, *case.weights)]
        loss = f(inputs[0], CascadeWeights(*inputs[1:]), case.target)
        return loss, *torch.autograd.grad(loss, inputs)

    def form(features, weights, target):
        return 2.0 * refine_cascade(features, weights, target, case.alpha).loss

    for actual, expected in zip(gradients(torch.compile(form, fullgraph=True)), gradients(form), strict=True):
        assert torch.equal(actual, expected)


def test_rows_with_masked_classes_and_nan_stay_rows():
    case = make_case(3, 20, 16, 8, 10)
    case.weights.logits_bias[:, 3] = -torch.inf  # a masked class
    case.target[case.target == 3] = 4
    actual = run(case)
    # p_0 gives the class mass: the first stage's consistency is infinite, its gradient is not
    assert actual["consistency"][0] == torch.inf and actual["stage_loss"][1:].isfinite().all()
    assert (actual["belief"][:, 3] == 0).all()
    assert all(actual[name].isfinite().all() for name in ("features", *CascadeWeights._fields))
    bad = make_case(3, 20, 16, 8, 10)
    clean = run(bad)
    bad.features[7] = torch.nan
    actual = run(bad)
    keep = torch.arange(20) != 7
    assert actual["belief"][7].isnan().all() and torch.equal(actual["belief"][keep], clean["belief"][keep])


def test_all_rows_ignored_and_no_rows():
    for case in (make_case(2, 9, 7, 5, 4, ignored=9), make_case(2, 0, 7, 5, 4)):
        actual = run(case)
        assert actual["loss"] == 0 and actual["belief"].shape == (len(case.features), 4)
        assert all((actual[name] == 0).all() for name in ("features", *CascadeWeights._fields))


def test_memory_held_does_not_grow_with_depth(allocated):
    """Check that memory beside inputs and results is at most GROUP_BYTES at any depth."""
    peaks = {}
    for stages in (32, 64):
        case = make_case(stages, 512, 256, 32, 10)
        assert cascade.stages_at_once(_problem(case)) < 32
        into = CascadeWeights(*(torch.empty_like(x) for x in case.weights))

        def call(case=case, into=into):
            result = refine_cascade_and_grad(case.features, case.weights, case.target, out=into)
            cascade_cpu.release()  # so that the memory it keeps counts for the next call
            return result

        peaks[stages] = allocated(call)
    assert peaks[64] <= cascade.GROUP_BYTES + (1 << 20)
    assert peaks[64] <= peaks[32] + (64 << 10)  # losses and biases, a few bytes per stage


def _problem(case):
    return make_problem(case.features, case.weights, case.target, 0.5, None, LossOptions(), True)


def test_under_autocast_and_under_other_defaults():
    case = make_case(3, 20, 16, 8, 10, prior=True)
    expected = run(case)
    half = case.features.bfloat16()  # as from a layer under autocast
    weights = CascadeWeights(*(x.clone().requires_grad_() for x in case.weights))
    with torch.autocast("cpu", torch.bfloat16):
        result = refine_cascade(half, weights, case.target, case.alpha, prior=case.prior)
    result.loss.backward()
    assert torch.allclose(result.stage_loss, expected["stage_loss"], rtol=0.02)
    assert weights.hidden_weight.grad.dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        cascade_cpu.release()  # as in a new thread
        actual = run(case)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_a_large_stage_is_not_kept_in_memory():
    run(make_case(1, 9000, 256, 4, 4))
    assert cascade_cpu._scratch.memory.nbytes <= cascade_cpu.KEPT_BYTES


def test_stages_are_the_fused_local_loss_of_what_they_read():
    case = make_case(3, 40, 32, 16, 10, alpha="stages")
    prior = torch.full((40, 10), 0.1)
    for i in range(3):
        hidden = torch.relu(torch.cat((prior, case.features), 1) @ case.weights[0][i].t() + case.weights[1][i])
        logits = hidden @ case.weights[2][i].t() + case.weights[3][i]
        loss, prior, fidelity, consistency = fused_local_loss(logits, prior, case.target, case.alpha[i])
        actual = run(case)
        for name, expected in (("stage_loss", loss), ("fidelity", fidelity), ("consistency", consistency)):
            assert torch.allclose(actual[name][i], expected, rtol=1e-5)


def test_gradients_in_hand_under_a_mode_and_compiled():
    """Check that tensors without an address take the operator: fake ones get shapes, and compiled code gets values."""
    case = make_case(3, 20, 16, 8, 10, alpha="stages")
    expected = run(case)
    actual = torch.compile(lambda: run(case), fullgraph=True)()
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)
    with FakeTensorMode() as mode:
        weights = CascadeWeights(*map(mode.from_tensor, case.weights))
        actual = run(Case(mode.from_tensor(case.features), weights, mode.from_tensor(case.target), case.alpha))
    assert all(
        actual[name].shape == expected[name].shape and actual[name].dtype == expected[name].dtype for name in NAMES
    )


BAD = [
    ({"features": [1.0]}, TypeError, "features is of type list; it must be a torch.Tensor"),
    ({"weights": None}, TypeError, "weights is of type NoneType; it must be CascadeWeights"),
    ({"features": torch.zeros(3)}, ValueError, r"features has shape \(3,\); it must be \(B, D\)"),
    ({"features": torch.zeros(9, 5, dtype=torch.int64)}, TypeError, "features has dtype torch.int64"),
    ({"features": torch.zeros(9, 6)}, ValueError, r"weights.hidden_weight has shape .* \(3, 7, 10\)"),
    ({"weights": torch.zeros(3)}, TypeError, "weights is of type Tensor; it must be CascadeWeights"),
    ({"alpha": [0.1, 0.2]}, ValueError, "alpha has 2 values; it must be one number or one for each of the 3 stages"),
    ({"alpha": [0.1, 0.2, 1.2]}, ValueError, "alpha is 1.2; it must lie in"),
    ({"alpha": torch.tensor([0.1, 0.2, 1.5])}, ValueError, "alpha is 1.5; it must lie in"),
    ({"alpha": "half"}, TypeError, "alpha is of type str"),
    ({"target": torch.zeros(8, dtype=torch.int64)}, ValueError, "target has shape"),
    ({"target": torch.full((9,), 4)}, IndexError, "target has label 4 in row 0"),
    ({"prior": torch.zeros(9, 5)}, ValueError, r"prior has shape \(9, 5\)"),
    ({"reduction": "none"}, ValueError, "reduction is 'none'; it must be one of"),
    ({"divergence": "reverse"}, ValueError, "full support"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    ({"backend": "cuda"}, (ValueError, RuntimeError), "cuda"),
    (
        {"out": "weights"},
        ValueError,
        "out.hidden_weight must be contiguous and share no memory with weights or features",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_named_before_anything_is_written(change, error, message):
    case = make_case(3, 9, 7, 5, 4)
    into = CascadeWeights(*(torch.full_like(x, 7.0) for x in case.weights))
    arguments = {"features": case.features, "weights": case.weights, "target": case.target, "out": into} | change
    if arguments["out"] == "weights":
        arguments["out"] = case.weights
    with pytest.raises(error, match=message):
        refine_cascade_and_grad(**arguments)
    assert all((x == 7.0).all() for x in into)
