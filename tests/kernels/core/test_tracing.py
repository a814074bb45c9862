"""Tests of the operations recorded by tracers: the recorded program gives the results for other inputs."""

import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.operations import NAMES, make_operation
from sid_kernels import (
    BeliefHead,
    CascadeWeights,
    belief_head_and_grad,
    fused_local_loss,
    local_loss_and_grad,
    refine_cascade,
    refine_cascade_and_grad,
)

TARGET = torch.tensor([0, 4, 2, 2])
WITH_GRADIENTS = {
    "loss": lambda z: local_loss_and_grad(z, None, TARGET)[1],
    "head": lambda *x: tuple(belief_head_and_grad(*x, None, TARGET)[1]),
    "cascade": lambda f, *w: tuple(refine_cascade_and_grad(f, CascadeWeights(*w), TARGET)[2]),
}
TRACERS = {
    "jit.trace": torch.jit.trace,
    "make_fx": lambda f, x: make_fx(f)(*x),
    "make_fx, pre-dispatch": lambda f, x: make_fx(f, pre_dispatch=True)(*x),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_recorded_programs(name, tracer, half):
    """Run recorded programs on other inputs; jit.trace and pre-dispatch used to record uninitialized memory."""
    operation = make_operation(name)
    inputs = tuple(x.bfloat16() if half else x for x in operation.inputs)
    others = tuple(x.flip(0) for x in inputs)
    for function in (lambda *x: operation.fused(*x), WITH_GRADIENTS[name]):
        recorded = TRACERS[tracer](function, inputs)
        torch.testing.assert_close(recorded(*others), function(*others))


@pytest.mark.parametrize("name", NAMES)
def test_traced_programs_are_differentiable(name):
    operation = make_operation(name)
    leaves = tuple(x.clone().requires_grad_() for x in operation.inputs)
    recorded = torch.jit.trace(lambda *x: operation.fused(*x), leaves)
    others = tuple(x.detach().flip(0).requires_grad_() for x in leaves)
    actual, expected = (torch.autograd.grad(f(*others), others) for f in (recorded, operation.fused))
    torch.testing.assert_close(actual, expected)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, *weights = make_operation("cascade").inputs
        self.layer, self.head = torch.nn.Linear(6, 5), BeliefHead(6, 5)
        self.stages = torch.nn.ParameterList(weights)

    def forward(self, x, prior, target):
        direct = fused_local_loss(self.layer(x), prior, target, 0.3).loss
        headed = self.head(x, prior, target, 0.3).loss
        stages = CascadeWeights(*(self.stages[i] for i in range(4)))
        return direct + headed + refine_cascade(x, stages, target, 0.3).loss


@pytest.mark.parametrize("tracer", ["symbolic_trace", "jit.trace"])
def test_module(tracer):
    network, draw = Network(), torch.Generator().manual_seed(0)
    x, prior = torch.randn(4, 6, generator=draw), torch.randn(4, 5, generator=draw).softmax(1)
    if tracer == "symbolic_trace":
        recorded = torch.fx.symbolic_trace(network)
    else:
        recorded = torch.jit.trace(network, (x.flip(0), prior.flip(0), TARGET.flip(0)))
    torch.testing.assert_close(recorded(x, prior, TARGET), network(x, prior, TARGET))
    recorded(x, prior, TARGET).backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def test_legacy_onnx_export_names_the_operator():
    pytest.importorskip("onnx")
    x = (torch.randn(4, 6), torch.full((4, 5), 0.2), TARGET)
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="sid_kernels::local_loss"):
        torch.onnx.export(Network(), x, io.BytesIO(), dynamo=False)
