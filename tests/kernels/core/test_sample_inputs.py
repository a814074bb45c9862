"""Tests with PyTorch's own sample inputs of cross_entropy, kl_div and linear: values, gradients, and opcheck on each."""

import importlib.util
import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F

from sid_kernels import fused_belief_head, fused_local_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = ("forward", 0.0, -100, "mean")


@pytest.fixture(scope="module")
def samples():
    """Return a function that lists the samples of an operator in a dtype."""
    if importlib.util.find_spec("expecttest") is None:  # the samples need only its base class of tests
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # type: ignore[assignment]
    from torch.testing._internal.common_methods_invocations import op_db

    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True  # it prevents other tests from setting flags

    def listed(name, dtype):
        (info,) = (x for x in op_db if x.name == f"nn.functional.{name}" and not x.variant_test_name)
        torch.manual_seed(0)
        return list(
            info.sample_inputs_func(info, "cpu", dtype, True)
        )  # `info.sample_inputs` inspects the stack each time

    return listed


def last(x):
    """Return (N, C, ...) as (N, ..., C)."""
    return x.movedim(1, -1) if x.dim() > 1 else x


def wide(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def assert_agree(fused, plain, leaves):
    """Compare the values, and the gradients in the dtype of the leaves."""
    dtype = leaves[0].dtype
    torch.testing.assert_close(fused, plain.to(fused.dtype), rtol=1e-5, atol=1e-6)
    incoming = torch.linspace(0.5, 2.0, fused.numel(), dtype=fused.dtype).view(fused.shape)
    actual = torch.autograd.grad(fused, leaves, incoming)
    expected = torch.autograd.grad(plain, leaves, incoming.to(plain.dtype))
    half = dtype in (torch.bfloat16, torch.float16)
    for a, b in zip(actual, expected, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        atol = 4 * torch.finfo(dtype).eps * scale if half else 1e-6
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps if half else 1e-5, atol=atol)


def cross_entropies(samples, dtype):
    for sample in samples("cross_entropy", dtype):
        if sample.kwargs.get("weight") is None:  # the local loss has no weights of classes
            kinds = {name: x for name, x in sample.kwargs.items() if name != "weight"}
            yield sample.input, sample.args[0], kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(samples, dtype):
    seen = 0
    for logits, target, kinds in cross_entropies(samples, dtype):
        z = last(logits.detach()).contiguous().requires_grad_()
        y = last(target).detach() if target.is_floating_point() else target
        result = fused_local_loss(z, None, y, 1.0, **kinds)
        back = z.movedim(-1, 1) if z.dim() > 1 else z
        plain = F.cross_entropy(
            back.to(wide(dtype)), target.to(wide(dtype)) if target.is_floating_point() else target, **kinds
        )
        if bool((y == kinds.get("ignore_index", -100)).all()) and not y.is_floating_point():
            plain = plain.nan_to_num()  # all rows ignored: 0 instead of NaN
        assert_agree(result.loss, plain, [z])
        torch.testing.assert_close(result.fidelity, result.loss.detach())
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_div(samples, dtype):
    seen = 0
    for sample in samples("kl_div", dtype):
        if not sample.input.dim():
            continue  # no classes
        z, q = sample.input.detach().requires_grad_(), sample.args[0].detach()
        q = q.exp() if sample.kwargs.get("log_target") else q
        q = q.abs()
        labels = torch.zeros(z.shape[:-1], dtype=torch.int64)
        reduction = {"batchmean": "mean"}.get(
            sample.kwargs.get("reduction", "mean"), sample.kwargs.get("reduction", "mean")
        )
        result = fused_local_loss(z, q, labels, 0.0, reduction=reduction)
        elements = F.kl_div(z.to(wide(dtype)).log_softmax(-1), q.to(wide(dtype)), reduction="none").sum(-1)
        plain = elements if reduction == "none" else elements.mean() if reduction == "mean" else elements.sum()
        assert_agree(result.loss, plain, [z])
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(samples, dtype):
    seen = 0
    for sample in samples("linear", dtype):
        hidden, (weight, *rest) = sample.input, sample.args
        bias = rest[0] if rest else sample.kwargs.get("bias")
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        inputs = (*leaves, *[None] * (3 - len(leaves)))
        if weight.dim() != 2 or 0 in weight.shape:
            with pytest.raises(ValueError, match="weight has shape"):
                fused_belief_head(*inputs, None, torch.zeros(hidden.shape[:-1], dtype=torch.int64))
            continue
        labels = torch.arange(hidden.shape[:-1].numel()).view(hidden.shape[:-1]) % weight.shape[0]
        result = fused_belief_head(*inputs, None, labels, 0.3)
        logits = F.linear(*(None if x is None else x.to(wide(dtype)) for x in inputs))
        if dtype in (torch.bfloat16, torch.float16):  # as a layer in this dtype rounds them
            logits = logits + (logits.to(dtype).to(logits.dtype) - logits).detach()
        assert_agree(result.loss, fused_local_loss(logits, None, labels, 0.3).loss, leaves)
        seen += 1
    assert seen >= 5


def test_opcheck(samples):
    """Run opcheck on every sample of the operators, once for equal signatures."""
    seen = set()

    def check(operator, arguments):
        key = repr([(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments])
        if key not in seen:
            seen.add(key)
            torch.library.opcheck(operator, arguments)

    for logits, target, kinds in cross_entropies(samples, torch.float32):
        z = last(logits.detach()).requires_grad_()
        options = (kinds.get("label_smoothing", 0.0), kinds.get("ignore_index", -100), kinds.get("reduction", "mean"))
        y = last(target.detach()) if target.is_floating_point() else target
        check(torch.ops.sid_kernels.local_loss.default, (z, None, y, None, 1.0, "forward", *options, "auto", True))
    for sample in samples("kl_div", torch.float32):
        if sample.input.dim():
            z, q = sample.input.detach().requires_grad_(), sample.args[0].detach().abs()
            labels = torch.zeros(z.shape[:-1], dtype=torch.int64)
            check(torch.ops.sid_kernels.local_loss.default, (z, q, labels, None, 0.0, *OPTIONS, "auto", True))
    for sample in samples("linear", torch.float32):
        hidden, (weight, *rest) = sample.input.detach().requires_grad_(), sample.args
        if weight.dim() == 2 and 0 not in weight.shape:
            labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64)
            layer = (hidden, weight.detach().requires_grad_(), rest[0].detach() if rest else None)
            rest = (None, None, None, None, labels, None, 0.5, *OPTIONS, True, True, True, False, "auto", None)
            check(torch.ops.sid_kernels.belief_head.default, (*layer, *rest))
    assert len(seen) >= 15
