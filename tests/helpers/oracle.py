"""Compute the reference results of the local loss, and limit how far a kernel may be from them.

`oracle` writes the loss as PyTorch users do, in float64, and differentiates it with autograd: it shares no code with
the library. `assert_within_budget` is the one rule of accuracy: a kernel may be no further from the float64 truth than
the same formula evaluated by PyTorch in float32, plus a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
# How many float32 roundings of its terms' magnitudes a value may be off, beyond PyTorch's own error. Measured over 3000
# random cases on the CPU backend: 13 at most, in rows of up to 3000 classes; half as many again for the loops of a GPU.
ROUNDINGS = 20
# The rest of a probability below float32's normal numbers, times a difference of logarithms of up to 3 * 88.
FLUSHED = 264 * TINY


@dataclass
class Case:
    """Arguments of one call."""

    logits: Tensor  # (N, C)
    prior: Tensor | None
    target: Tensor
    alpha: float | Tensor = 0.5
    options: dict[str, Any] = field(default_factory=dict)  # divergence, label_smoothing, ignore_index, reduction

    def to(self, device) -> Case:
        def move(x):
            return x.to(device) if isinstance(x, Tensor) else x

        return Case(move(self.logits), move(self.prior), move(self.target), move(self.alpha), dict(self.options))


@dataclass
class Truth:
    loss: Tensor
    fidelity: Tensor
    consistency: Tensor
    belief: Tensor
    dlogits: Tensor


@dataclass
class SizedTruth(Truth):
    # What each value was summed from, all terms positive: rounding errors are in proportion to it, not to the value.
    size: dict[str, Tensor]


def make_case(
    rows: int,
    classes: int,
    *,
    dtype=torch.float32,
    prior_dtype=None,
    prior: bool = True,
    soft: bool = False,
    alpha: float | str = 0.5,
    seed: int = 0,
    scale: float = 3.0,
    ignored: float = 0.0,
    **options,
) -> Case:
    """Draw random logits, prior and target.

    alpha: a float, or "rows" / "scalar" for a tensor. ignored: a share of the rows.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * scale).to(dtype)
    q = torch.randn(rows, classes, generator=g).mul(2.0).softmax(-1).to(prior_dtype or dtype) if prior else None
    if soft:
        target = torch.randn(rows, classes, generator=g).mul(2.0).softmax(-1).to(dtype)
    else:
        target = torch.randint(0, classes, (rows,), generator=g)
        if ignored:
            target[torch.rand(rows, generator=g) < ignored] = options.get("ignore_index", -100)
    if alpha == "rows":
        alpha = torch.rand(rows, generator=g)
    elif alpha == "scalar":
        alpha = torch.tensor(0.3)
    return Case(logits, q, target, alpha, options)


def oracle(case: Case, dtype=torch.float64) -> SizedTruth:
    """Compute the loss by log_softmax and sums, and its gradient by autograd, in `dtype` on the case's device."""
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    z = case.logits.detach().to(dtype).requires_grad_()
    rows, classes = z.shape
    q = torch.full_like(z, 1.0 / classes) if case.prior is None else case.prior.to(dtype)
    q, s = q.detach(), o["label_smoothing"]
    if case.target.dtype.is_floating_point:
        y, counts = case.target.to(dtype), torch.ones(rows, dtype=torch.bool, device=z.device)
    else:
        counts = case.target != o["ignore_index"]
        y = torch.nn.functional.one_hot(torch.where(counts, case.target, 0), classes).to(dtype)
    y = (1 - s) * y + s / classes
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    alpha = (
        case.alpha.to(dtype)
        if isinstance(case.alpha, Tensor)
        else torch.tensor(case.alpha, dtype=dtype, device=z.device)
    )
    a = alpha.expand(rows)
    log_q, log_y = q.clamp(min=TINY).log(), y.clamp(min=TINY).log()
    if o["divergence"] == "forward":
        fidelity = -_product(y, log_p).sum(-1)
        consistency = (_product(q, log_q) - _product(q, log_p)).sum(-1)
    else:
        fidelity = _product(p, log_p - log_y).sum(-1)
        consistency = _product(p, log_p - log_q).sum(-1)
    loss = _product(a, fidelity) + _product(1 - a, consistency)

    number = max(int(counts.sum()), 1) if o["reduction"] == "mean" else 1

    def reduced(x):
        x = torch.where(counts, x, 0.0)
        return x if o["reduction"] == "none" else x.sum() / number

    (dlogits,) = torch.autograd.grad(torch.where(counts, loss, 0.0).sum() / number, z)
    with torch.no_grad():
        size = _sizes(p, log_p, q, log_q, y, log_y, a, o["divergence"] == "reverse")
        size = {
            name: x if name == "belief" else x / number if name == "dlogits" else reduced(x) for name, x in size.items()
        }
    values = [reduced(x).detach() for x in (loss, fidelity, consistency)]
    return SizedTruth(*values, p.detach(), dlogits, size)


def _product(a, b):
    """Return a b with 0 * -inf = 0, in the value and in the gradient."""
    return torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, b))


def _sizes(p, log_p, q, log_q, y, log_y, alpha, reverse) -> dict[str, Tensor]:
    """Sum the magnitudes of each value's terms; 1 + |x|, because exp and log of x are off by roundings of both."""
    a = alpha[:, None]
    belief = p + _product(p, -log_p)
    if reverse:
        by_target, by_prior = (_product(p, 1 - log_p - x) for x in (log_y, log_q))
        terms = 1 - log_p - a * log_y - (1 - a) * log_q
        slope = log_p - a * log_y - (1 - a) * log_q
        slope = slope - _product(p, slope).sum(-1, keepdim=True)
        dlogits = _product(p, terms + _product(p, terms).sum(-1, keepdim=True) - log_p * slope.abs())
    else:
        by_target, by_prior = _product(y, 1 - log_p), _product(q, 1 - log_q - log_p)
        mass = a * y.sum(-1, keepdim=True) + (1 - a) * q.sum(-1, keepdim=True)
        dlogits = mass * belief + a * y + (1 - a) * q
    fidelity, consistency = by_target.sum(-1), by_prior.sum(-1)
    loss = _product(alpha, fidelity) + _product(1 - alpha, consistency)
    return dict(loss=loss, fidelity=fidelity, consistency=consistency, belief=belief, dlogits=dlogits)


def assert_within_budget(result, dlogits: Tensor | None, case: Case, factor: float = 1.0) -> None:
    """Check |kernel - float64| <= |PyTorch in float32 - float64| (largest of the row) + a few roundings.

    A few roundings: of float32, in proportion to the terms the value is summed from; and one of the dtype it is stored
    in. result: LocalLoss or Truth (loss, belief, fidelity, consistency), any device. NaN and infinities must coincide.
    """
    truth = oracle(case)
    compute = torch.float64 if case.logits.dtype is torch.float64 else torch.float32
    peer_truth = oracle(case, compute)  # inputs as they are, sums in float32, not yet rounded to a storage dtype
    belief_dtype = case.logits.dtype if case.prior is None else case.prior.dtype
    values = [(name, getattr(result, name), compute) for name in ("loss", "fidelity", "consistency")]
    values.append(("belief", result.belief, belief_dtype))
    if dlogits is not None:
        values.append(("dlogits", dlogits, case.logits.dtype))
    for name, actual, dtype in values:
        expected = getattr(truth, name)
        assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        actual = actual.detach().to(expected.device).double()
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places than in float64"
        assert torch.equal(actual[expected.isinf()], expected[expected.isinf()]), (
            f"{name}: infinities differ from float64's"
        )
        finite = expected.isfinite()
        error = torch.where(finite, (actual - expected).abs(), 0.0)
        allowed = _largest(getattr(peer_truth, name).double() - expected)
        allowed = allowed + factor * (ROUNDINGS * torch.finfo(compute).eps / 2 * truth.size[name] + FLUSHED)
        if dtype is not compute:  # half precision: the error of a rounding to nearest, in normal and subnormal numbers
            info = torch.finfo(dtype)
            allowed = allowed + info.eps / 2 * expected.abs() + info.tiny * info.eps / 2
        beyond = torch.where(finite, error - allowed, -1.0)
        if beyond.numel() and float(beyond.max()) > 0:
            worst = int(beyond.argmax())
            at, budget = float(error.flatten()[worst]), float(allowed.expand_as(error).flatten()[worst])
            raise AssertionError(
                f"{name}: error {at:.3e} > allowed {budget:.3e} at element {worst} "
                f"(got {float(actual.flatten()[worst])!r}, float64 {float(expected.flatten()[worst])!r})"
            )


def _largest(error: Tensor) -> Tensor:
    """Return the largest finite error of each row of a matrix, or of all elements of other tensors."""
    error = error.nan_to_num(0.0, 0.0, 0.0).abs()
    if error.numel() == 0:
        return torch.zeros((), device=error.device)
    return error.amax(-1, keepdim=True) if error.dim() == 2 else error.max()
