"""Tests of tensors that hold no plain rows, of counted operations, and of a head as a model's output layer."""

import pytest
import torch
import torch.nn.functional as F
from torch.masked import masked_tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers.operations import NAMES, make_operation
from sid_kernels import (
    BeliefHead,
    CascadeWeights,
    PriorHead,
    fused_belief_head,
    fused_local_loss,
    local_loss_and_grad,
    refine_cascade,
)

TARGET = torch.tensor([0, 4, 2, 2])


def negated(x):
    """Return -x as a view with the negative bit, contiguous or not."""
    view = torch.complex(torch.zeros_like(x), x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("name", NAMES)
def test_views_with_the_negative_bit(name):
    operation = make_operation(name)
    inputs = tuple(x.detach() for x in operation.inputs)
    expected = operation.fused(*(-x for x in inputs))
    assert torch.equal(operation.fused(*map(negated, inputs)), expected)


@pytest.mark.parametrize("which", ["logits", "prior", "target", "alpha"])
def test_tensors_of_implied_zeros(which):
    given = {
        "logits": torch.randn(4, 5), "prior": torch.full((4, 5), 0.2), "target": TARGET, "alpha": torch.full((), 0.3),
    }  # fmt: skip
    zeros = torch._efficientzerotensor(given[which].shape, dtype=given[which].dtype)
    actual, gradient = local_loss_and_grad(**(given | {which: zeros}))
    want, expected = local_loss_and_grad(**(given | {which: torch.zeros_like(given[which])}))
    assert torch.equal(actual.loss, want.loss) and torch.equal(gradient, expected)
    if which == "prior":  # the call of a training step
        actual = fused_local_loss(given["logits"], zeros, TARGET)
        assert torch.equal(actual.loss, fused_local_loss(given["logits"], torch.zeros(4, 5), TARGET).loss)


def unusual():
    parts = [torch.randn(2, 5), torch.randn(2, 5)]
    yield pytest.param(torch.nested.nested_tensor(parts), "nested", id="nested")
    yield pytest.param(torch.nested.nested_tensor(parts, layout=torch.jagged), "nested", id="jagged")
    yield pytest.param(torch.randn(4, 5).to_sparse(), "torch.sparse_coo", id="sparse")
    yield pytest.param(masked_tensor(torch.randn(4, 5), torch.ones(4, 5).bool()), "masked", id="masked")


@pytest.mark.parametrize(("x", "kind"), list(unusual()))
def test_tensors_without_plain_rows_are_refused_by_name(x, kind):
    plain, weight = torch.rand(4, 5), torch.randn(3, 5)
    weights = CascadeWeights(torch.randn(1, 2, 8), torch.randn(1, 2), torch.randn(1, 3, 2), torch.randn(1, 3))
    target = torch.tensor([0, 2, 1, 1])
    for call, name in (
        (lambda: fused_local_loss(x, plain, target), "logits"),
        (lambda: fused_local_loss(plain, x, target), "prior"),
        (lambda: fused_local_loss(plain, None, x), "target"),
        (lambda: fused_belief_head(x, weight, None, None, target), "hidden"),
        (lambda: refine_cascade(x, weights, target), "features"),
    ):
        with pytest.raises(TypeError, match=f"^{name} is a {kind} tensor; it must be a dense one"):
            call()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("prior_head", [False, True])
def test_operations_of_a_head_are_counted(reduction, prior_head):
    """Check the counts, which used to be 0: those of the layers, and once more the product if there is no reduction."""
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    prior = PriorHead(torch.randn(4, 3), torch.randn(5, 3)) if prior_head else None
    with FlopCounterMode(display=False) as counter:
        fused_belief_head(hidden, weight, None, prior, TARGET, reduction=reduction).loss.sum().backward()
    passes = 1 if reduction == "mean" else 2
    assert counter.get_total_flops() == 2 * 4 * 5 * ((2 + passes) * 6 + passes * 3 * prior_head)


def test_operations_of_a_cascade_are_counted():
    operation = make_operation("cascade")
    inputs = [x.clone().requires_grad_() for x in operation.inputs]
    with FlopCounterMode(display=False) as counter:
        operation.fused(*inputs).backward()
    by_stage, forward = 2 * 4 * 2, 7 * 11 + 7 * 5
    assert counter.get_total_flops() == by_stage * (2 * forward + 7 * 5 + 7 * 6)
    with FlopCounterMode(display=False) as counter:
        operation.fused(*operation.inputs)
    assert counter.get_total_flops() == by_stage * forward


def test_a_head_without_a_target_is_a_linear_layer():
    """Call a head with the hidden states alone, as `generate()` and others call a model's output layer."""
    head, hidden = BeliefHead(6, 5), torch.randn(2, 3, 6)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))
    embedding = torch.nn.Embedding(5, 6)
    head.weight = embedding.weight  # tied weights, as of a language model
    assert torch.equal(head(hidden), F.linear(hidden, embedding.weight, head.bias))
    for options in ({"prior": torch.full((2, 3, 5), 0.2)}, {"reduction": "sum"}):
        with pytest.raises(TypeError, match="target is None"):
            head(hidden, **options)
