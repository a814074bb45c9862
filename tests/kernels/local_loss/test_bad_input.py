"""Tests of bad input: the exception, and a message that names the argument, what it was and what it must be.

Every case goes through both public operations, and nothing may have been written by then.
"""

import math

import pytest
import torch

from sid_kernels import fused_local_loss, local_loss_and_grad
from sid_kernels.core.options import LossOptions

ROWS, CLASSES = 4, 6
SHAPE = r"\(4, 6\)"


def arguments(**changes):
    good = dict(
        logits=torch.randn(ROWS, CLASSES), prior=torch.full((ROWS, CLASSES), 1 / CLASSES),
        target=torch.tensor([0, 5, -100, 2]), alpha=0.5,
    )  # fmt: skip
    return good | changes


def moved(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x


def bits(x):
    return x.reshape(-1).view(torch.uint8)


def refused(on, error, message, **changes):
    """Check that both operations raise `error`, and that `out` and the logits keep every bit."""
    call = arguments(**changes)
    if on is not None:
        call = {name: moved(x, on.device) for name, x in call.items()} | dict(backend=on.name)
    tensors = [x for x in call.values() if isinstance(x, torch.Tensor) and x.device.type != "meta"]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(error, match=message):
        local_loss_and_grad(**call)
    call.pop("out", None)
    if "out" not in changes:
        with pytest.raises(error, match=message):
            fused_local_loss(**call)
    for x, copy in zip(tensors, before, strict=True):
        assert torch.equal(bits(x), bits(copy))


i64 = torch.int64
BAD = {
    "logits list": (TypeError, r"logits is of type list; it must be a torch\.Tensor", dict(logits=[[0.0]])),
    "logits int": (TypeError, r"logits has dtype torch\.int64; it must be float32", dict(logits=torch.zeros(4, 6, dtype=i64))),
    "logits complex": (TypeError, r"logits has dtype torch\.complex64", dict(logits=torch.zeros(4, 6, dtype=torch.complex64))),
    "logits scalar": (ValueError, r"logits has shape \(\); it must be \(\.\.\., C\)", dict(logits=torch.tensor(1.0))),
    "no classes": (ValueError, r"logits has shape \(4, 0\); it must be \(\.\.\., C\) with at least one", dict(logits=torch.zeros(4, 0))),
    "prior float": (TypeError, r"prior is of type float; it must be a torch\.Tensor", dict(prior=0.1)),
    "prior shape": (ValueError, rf"prior has shape \(6,\); it must have the shape of logits, {SHAPE}", dict(prior=torch.ones(6))),
    "prior dtype": (TypeError, r"prior has dtype torch\.int64; it must be float32", dict(prior=torch.ones(4, 6, dtype=i64))),
    "prior float64": (TypeError, r"prior has dtype torch\.float64 and logits torch\.float32", dict(prior=torch.ones(4, 6).double())),
    "prior device": (ValueError, r"prior is on meta; it must be on the device of logits", dict(prior=torch.ones(4, 6, device="meta"))),
    "target list": (TypeError, r"target is of type list; it must be a torch\.Tensor", dict(target=[0, 1, 2, 3])),
    "target bool": (TypeError, r"target has dtype torch\.bool; it must be an integer", dict(target=torch.zeros(4, dtype=torch.bool))),
    "label shape": (ValueError, r"target has shape \(4, 1\); labels must have shape \(4,\)", dict(target=torch.zeros(4, 1, dtype=i64))),
    "soft shape": (ValueError, rf"target has shape \(4,\) and dtype torch\.float32.*shape of logits, {SHAPE}", dict(target=torch.zeros(4))),
    "target device": (ValueError, r"target is on meta; it must be on the device", dict(target=torch.zeros(4, dtype=i64, device="meta"))),
    "soft device": (ValueError, r"target is on meta; it must be on the device", dict(target=torch.zeros(4, 6, device="meta"))),
    "alpha str": (TypeError, r"alpha is of type str; it must be a float in \[0, 1\] or a tensor", dict(alpha="0.5")),
    "alpha bool": (TypeError, r"alpha is of type bool; it must be a float", dict(alpha=True)),
    "alpha None": (TypeError, r"alpha is of type NoneType; it must be a float", dict(alpha=None)),
    "alpha high": (ValueError, r"alpha is 1\.5; it must lie in \[0, 1\]", dict(alpha=1.5)),
    "alpha low": (ValueError, r"alpha is -0\.1; it must lie in \[0, 1\]", dict(alpha=-0.1)),
    "alpha nan": (ValueError, r"alpha is nan; it must lie in \[0, 1\]", dict(alpha=math.nan)),
    "alpha dtype": (TypeError, r"alpha has dtype torch\.int64; it must be a floating dtype", dict(alpha=torch.tensor(1))),
    "alpha shape": (ValueError, r"alpha has shape \(6,\); it must be \(\) or one per row, \(4,\)", dict(alpha=torch.rand(6))),
    "alpha column": (ValueError, r"alpha has shape \(4, 1\); it must be \(\) or one per row", dict(alpha=torch.rand(4, 1))),
    "alpha device": (ValueError, r"alpha is on meta; it must be on the device", dict(alpha=torch.rand(4, device="meta"))),
    "divergence": (ValueError, r"divergence is 'jensen'; it must be one of \('forward', 'reverse'\)", dict(divergence="jensen")),
    "reverse hard": (ValueError, r"divergence='reverse' needs a target of full support: label_smoothing is 0", dict(divergence="reverse")),
    "smoothing high": (ValueError, r"label_smoothing is 1\.1; it must lie in \[0, 1\]", dict(label_smoothing=1.1)),
    "smoothing low": (ValueError, r"label_smoothing is -0\.1; it must lie in \[0, 1\]", dict(label_smoothing=-0.1)),
    "smoothing nan": (ValueError, r"label_smoothing is nan; it must lie in \[0, 1\]", dict(label_smoothing=math.nan)),
    "smoothing str": (TypeError, r"label_smoothing is of type str; it must be a float", dict(label_smoothing="a")),
    "smoothing bool": (TypeError, r"label_smoothing is of type bool; it must be a float", dict(label_smoothing=True)),
    "ignore float": (TypeError, r"ignore_index is of type float; it must be an int", dict(ignore_index=1.0)),
    "reduction": (ValueError, r"reduction is 'batchmean'; it must be one of \('none', 'mean', 'sum'\)", dict(reduction="batchmean")),
    "out list": (TypeError, r"out is of type list; it must be a torch\.Tensor", dict(out=[])),
    "out shape": (ValueError, rf"out has shape \(4, 7\).*it must be like logits: {SHAPE}", dict(out=torch.zeros(4, 7))),
    "out dtype": (ValueError, r"out has shape \(4, 6\), dtype torch\.float16.*like logits", dict(out=torch.zeros(4, 6).half())),
    "out device": (ValueError, r"out has .* on meta; it must be like logits", dict(out=torch.zeros(4, 6, device="meta"))),
    "out columns": (ValueError, r"out has strides \(1, 4\); its columns must be adjacent", dict(out=torch.zeros(6, 4).t())),
    "out one row": (ValueError, r"out has strides \(0, 1\); its columns must be adjacent and its rows must not overlap", dict(out=torch.zeros(1, 6).expand(4, 6))),
    "out rows overlap": (ValueError, r"its rows must not overlap", dict(out=torch.zeros(40).as_strided((4, 6), (5, 1)))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(backend, case):
    error, message, changes = BAD[case]
    if any(isinstance(x, torch.Tensor) and not x.is_contiguous() for x in changes.values()) and backend.device != "cpu":
        pytest.skip("moving to the device changes the strides this case is about; the CPU's run covers the check")
    refused(backend, error, message, **changes)


LABELS = {
    "too large": (
        [0, 6, 1, 2],
        r"target has label 6 in row 1; it must be in \[0, 6\) or equal ignore_index \(-100\)",
        {},
    ),
    "negative": ([0, 1, 2, -1], r"target has label -1 in row 3; it must be in \[0, 6\)", {}),
    "the default when another is ignored": (
        [-100, 3, 3, 3],
        r"label -100 in row 0; .* ignore_index \(3\)",
        dict(ignore_index=3),
    ),
    "huge": ([0, 0, 2**40, 7], rf"target has label {2**40} in row 2", {}),
}


@pytest.mark.parametrize(
    "more", ({}, dict(alpha=torch.full((ROWS,), 0.5)), dict(label_smoothing=0.1, reduction="none")), ids=str
)
@pytest.mark.parametrize("case", LABELS)
def test_label_out_of_range(backend, case, more):
    if backend.device != "cpu":
        pytest.skip("on a GPU such a row is NaN, without synchronization: test_gpu.py")
    labels, message, options = LABELS[case]
    refused(backend, IndexError, message, target=torch.tensor(labels), **options, **more)
    if not options and not more:
        refused(None, IndexError, message, target=torch.tensor(labels))  # the call with every option at its default
    refused(backend, IndexError, message, target=torch.tensor(labels), out=torch.full((4, 6), 7.0), **options, **more)


def test_label_out_of_range_in_more_dimensions_and_other_dtypes(backend):
    if backend.device != "cpu":
        pytest.skip("on a GPU such a row is NaN, without synchronization: test_gpu.py")
    labels = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    with pytest.raises(IndexError, match=r"label 255 in row 3"):
        fused_local_loss(torch.randn(2, 2, 6), None, labels, backend=backend.name)
    assert fused_local_loss(torch.randn(2, 2, 6), None, labels, ignore_index=255, backend=backend.name).loss.isfinite()


@pytest.mark.parametrize(
    "alpha", ([0.0, 0.5, 1.25, 0.5], [0.5, -0.125, 1.0, 2.0], [0.5, 0.5, 0.5, math.nan], -0.5, math.nan)
)
def test_alpha_tensor_out_of_range(backend, alpha):
    if backend.device != "cpu":
        pytest.skip("values on a GPU are read under SID_KERNELS_DEBUG=1 only: test_gpu.py")
    values = alpha if isinstance(alpha, list) else [alpha]
    first = next(x for x in values if not 0 <= x <= 1)
    refused(backend, ValueError, rf"alpha is {first}; it must lie in \[0, 1\]", alpha=torch.tensor(alpha))
    refused(backend, ValueError, rf"alpha is {first}", alpha=torch.tensor(alpha), out=torch.full((4, 6), 7.0))


def test_out_that_overlaps_other_memory(backend):
    """Check that `out` must be the logits as a whole, or memory that no other argument uses."""
    shift = torch.randn(5, CLASSES, device=backend.device)
    labels = torch.zeros(4, dtype=i64, device=backend.device)

    def call(message, logits, prior=None, target=labels, alpha=0.5, out=None):
        before = shift.clone()
        with pytest.raises(ValueError, match=message):
            local_loss_and_grad(logits, prior, target, alpha, backend=backend.name, out=out)
        with pytest.raises(ValueError, match=message):  # an ordinary call, which skips the general checks if it can
            local_loss_and_grad(logits, prior, target, alpha, out=out)
        assert torch.equal(shift, before)

    mine = torch.randn(4, CLASSES, device=backend.device)
    call("out overlaps logits; it must be logits itself or memory of its own", shift[:4], out=shift[1:])
    wide = torch.randn(4, CLASSES + 1, device=backend.device)
    call("out overlaps logits", wide[:, 1:], out=wide[:, :-1])
    call("out shares memory with prior", mine, prior=shift[:4], out=shift[:4])
    call("out shares memory with prior", mine, prior=shift[:4], out=shift[1:])
    call("out shares memory with prior", mine, prior=mine, out=mine)
    call("out shares memory with prior", shift[:4], prior=shift[1:], out=shift[:4])
    call("out shares memory with target", mine, target=shift[:4], out=shift[1:])
    call("out shares memory with alpha", mine, alpha=shift.view(-1)[:4], out=shift[:4])


# ---- backends --------------------------------------------------------------------------------------------------------


def test_unknown_backend():
    refused(
        None,
        ValueError,
        r"backend is 'cudnn'; it must be 'auto' or one of \('reference', 'cpu', 'cuda', 'triton'\)",
        backend="cudnn",
    )


def test_float64_is_for_the_reference_backend():
    case = arguments(logits=torch.randn(4, 6).double(), prior=None)
    with pytest.raises(
        TypeError, match=r"logits has dtype torch\.float64, which only backend 'reference' takes; backend is 'cpu'"
    ):
        fused_local_loss(**case, backend="cpu")
    assert fused_local_loss(**case).loss.dtype is torch.float64  # auto finds it


@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_backend_on_the_wrong_device_or_not_here(name):
    from sid_kernels.core import backends

    reason = backends.unavailable(name)
    if reason is None:
        refused(None, ValueError, rf"logits is on cpu; backend '{name}' takes tensors on cuda", backend=name)
    else:
        with pytest.raises(RuntimeError) as raised:
            fused_local_loss(**arguments(), backend=name)
        assert str(raised.value) == f"backend {name!r} cannot be used here: {reason}" and len(reason) > 10


@pytest.mark.gpu
def test_cpu_backend_with_tensors_on_a_gpu():
    z, labels = torch.randn(4, 6, device="cuda"), torch.zeros(4, dtype=i64, device="cuda")
    with pytest.raises(ValueError, match=r"logits is on cuda:0; backend 'cpu' takes tensors on cpu"):
        fused_local_loss(z, None, labels, backend="cpu")
    with pytest.raises(ValueError, match=r"target is on cpu; it must be on the device of logits, cuda:0"):
        fused_local_loss(z, None, labels.cpu())


# ---- the compiled module itself --------------------------------------------------------------------------------------


def test_compiled_module_refuses_null_pointers():
    _C = pytest.importorskip("sid_kernels._C", reason="the compiled module sid_kernels._C is not built")
    z, belief = torch.randn(2, 3), torch.empty(2, 3)
    labels, losses = torch.zeros(2, dtype=i64), torch.empty(3)

    def call(z=z.data_ptr(), labels=labels.data_ptr(), belief=belief.data_ptr(), loss=losses.data_ptr()):
        nothing = (0, 0, 0)
        spec = (labels, nothing, 0, 0, 0.5, LossOptions().packed)
        outputs = (loss, (belief, 3, 0), losses[1:].data_ptr(), losses[2:].data_ptr(), nothing)
        return _C.local_loss(2, 3, (z, 3, 0), nothing, spec, outputs, 1)

    assert call() is None
    for name in ("z", "labels", "loss"):
        with pytest.raises(ValueError, match="null pointer for logits, target or a loss"):
            call(**{name: 0})
    belief.fill_(7.0)
    assert call(belief=0) is None and (belief == 7.0).all()  # a belief at address 0 is not wanted and not written
    with pytest.raises(TypeError):
        _C.local_loss(2, 3)
