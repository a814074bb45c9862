"""The truth the kernels are held to, and how far they may be from it.

`oracle` writes the loss as PyTorch users do, in float64, and differentiates it with autograd: it shares no code
with the library. `assert_within_budget` is the one rule of accuracy: a kernel may be no further from the float64
truth than the same formula evaluated by PyTorch in the kernel's own dtypes, plus a small absolute term.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
# Absolute terms, for values of order one: a few float32 roundings for what is computed in float32, one unit in the
# last place at 1 for what is stored in half precision.
ABSOLUTE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


@dataclass
class Case:
    """Arguments of one call, on the CPU."""

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
    """Random logits, prior, target. alpha: a float, or "rows" / "scalar" for a tensor; ignored: a share of the rows."""
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


def oracle(case: Case, dtype=torch.float64) -> Truth:
    """The loss by log_softmax and sums, its gradient by autograd, evaluated in `dtype`."""
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    z = case.logits.detach().to(dtype).requires_grad_()
    rows, classes = z.shape
    q = torch.full_like(z, 1.0 / classes) if case.prior is None else case.prior.to(dtype)
    q, s = q.detach(), o["label_smoothing"]
    if case.target.dtype.is_floating_point:
        y, counts = case.target.to(dtype), torch.ones(rows, dtype=torch.bool)
    else:
        counts = case.target != o["ignore_index"]
        y = torch.nn.functional.one_hot(torch.where(counts, case.target, 0), classes).to(dtype)
    y = (1 - s) * y + s / classes
    log_p = z.log_softmax(-1)
    p = log_p.exp()

    def product(a, b):  # 0 * -inf = 0, in the value and in the gradient
        return torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, b))

    def log(x):
        return x.clamp(min=TINY).log()

    if o["divergence"] == "forward":
        fidelity = -product(y, log_p).sum(-1)
        consistency = (product(q, log(q)) - product(q, log_p)).sum(-1)
    else:
        fidelity = product(p, log_p - log(y)).sum(-1)
        consistency = product(p, log_p - log(q)).sum(-1)
    alpha = case.alpha.to(dtype) if isinstance(case.alpha, Tensor) else torch.tensor(case.alpha, dtype=dtype)
    loss = product(alpha.expand(rows), fidelity) + product((1 - alpha).expand(rows), consistency)
    loss, fidelity, consistency = (torch.where(counts, x, 0.0) for x in (loss, fidelity, consistency))
    total = loss.sum()
    if o["reduction"] == "mean":
        number = max(int(counts.sum()), 1)
        total = total / number
        loss, fidelity, consistency = (x.sum() / number for x in (loss, fidelity, consistency))
    elif o["reduction"] == "sum":
        loss, fidelity, consistency = (x.sum() for x in (loss, fidelity, consistency))
    (dlogits,) = torch.autograd.grad(total, z)
    return Truth(loss.detach(), fidelity.detach(), consistency.detach(), p.detach(), dlogits)


def assert_within_budget(result, dlogits: Tensor | None, case: Case, factor: float = 1.0) -> None:
    """|kernel - float64| <= |PyTorch in the same dtype - float64| (its largest) + a small absolute term, everywhere.

    result: LocalLoss or Truth (loss, belief, fidelity, consistency), any device. NaN and infinities must coincide.
    """
    truth = oracle(case)
    compute = torch.float64 if case.logits.dtype is torch.float64 else torch.float32
    # "The same dtype": inputs as they are, sums in float32, what is stored rounded to its storage dtype.
    same = oracle(case, compute)
    belief_dtype = case.logits.dtype if case.prior is None else case.prior.dtype
    pairs = [(name, getattr(result, name), compute) for name in ("loss", "fidelity", "consistency")]
    pairs.append(("belief", result.belief, belief_dtype))
    if dlogits is not None:
        pairs.append(("dlogits", dlogits, case.logits.dtype))
    for name, got, dtype in pairs:
        want = getattr(truth, name)
        assert got.dtype == dtype, f"{name}: dtype {got.dtype}, expected {dtype}"
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        got, peer = got.detach().cpu().double(), getattr(same, name).to(dtype).double()
        finite = want.isfinite()
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in other places than in float64"
        assert torch.equal(got[want.isinf()], want[want.isinf()]), f"{name}: infinities differ from float64's"
        if not finite.any():
            continue
        error = (got - want)[finite].abs()
        both = finite & peer.isfinite()
        allowed = float((peer - want)[both].abs().max()) if both.any() else 0.0
        if name in ("belief", "dlogits"):
            # computed in float32; in half precision then stored, which rounds relative to the value
            size = 1.0 if dtype is compute else float(want[finite].abs().max().clamp(max=1.0))
            allowed += factor * (size * ABSOLUTE[dtype] + torch.finfo(torch.float32).eps * (dtype is not compute))
        else:  # sums of many or large terms round with their size, whichever order they are taken in
            allowed += factor * max(1.0, float(want[finite].abs().max())) * ABSOLUTE[compute]
        worst = int(error.argmax())
        assert float(error.max()) <= allowed, (
            f"{name}: error {float(error.max()):.3e} > allowed {allowed:.3e} "
            f"(got {float(got[finite][worst])!r}, float64 {float(want[finite][worst])!r})"
        )
