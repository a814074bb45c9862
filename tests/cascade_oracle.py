"""The truth a cascade is held to: its stages one by one in float64, by autograd, a `detach` between them.

It shares no code with the library. `assert_within_budget` is the rule of oracle.py for a chain of stages: no further from
float64 than the same formulas in PyTorch in the same dtype, plus a few roundings of each result's own scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import CascadeWeights

TINY = torch.finfo(torch.float32).tiny
NAMES = ("loss", "stage_loss", "fidelity", "consistency", "belief", "logits", "features", *CascadeWeights._fields)
# Roundings of a result's largest entry, beyond PyTorch's own error. Stages amplify what the ones before them were off by.
ROUNDINGS = 32


@dataclass
class Case:
    features: Tensor
    weights: CascadeWeights
    target: Tensor
    alpha: Any = 0.5
    prior: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def make_case(
    stages=3, rows=9, width=7, dim=5, classes=4, *, dtype=torch.float32, seed=0, scale=1.0, soft=False, prior=False,
    alpha=0.5, ignored=0, **options,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, by=1.0):
        return (torch.randn(*shape, generator=g) * by).to(dtype)

    weights = CascadeWeights(
        normal(stages, width, classes + dim, by=scale * (classes + dim) ** -0.5), normal(stages, width, by=0.3),
        normal(stages, classes, width, by=2 * scale * width**-0.5), normal(stages, classes, by=0.3),
    )  # fmt: skip
    if soft:
        target = normal(rows, classes, by=2.0).float().softmax(-1).to(dtype)
    else:
        target = torch.randint(0, classes, (rows,), generator=g)
        target[:ignored] = options.get("ignore_index", -100)
    given = normal(rows, classes, by=2.0).float().softmax(-1).to(dtype) if prior else None
    if alpha == "stages":
        alpha = [0.9 - 0.7 * i / max(stages - 1, 1) for i in range(stages)]
    return Case(normal(rows, dim), weights, target, alpha, given, options)


def truth(case: Case, dtype=torch.float64) -> dict[str, Tensor]:
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    features = case.features.detach().to(dtype).requires_grad_()
    weights = [x.detach().to(dtype).requires_grad_() for x in case.weights]
    w1, b1, w2, b2 = weights
    stages, classes, _ = w2.shape
    rows, s = len(features), o["label_smoothing"]
    if case.target.is_floating_point():
        y, counts = case.target.to(dtype), torch.ones(rows, dtype=torch.bool)
    else:
        counts = case.target != o["ignore_index"]
        y = F.one_hot(torch.where(counts, case.target, 0), classes).to(dtype)
    y = (1 - s) * y + s / classes
    q = torch.full((rows, classes), 1 / classes, dtype=dtype) if case.prior is None else case.prior.to(dtype)
    number = max(int(counts.sum()), 1) if o["reduction"] == "mean" else 1
    alphas = case.alpha if isinstance(case.alpha, list) else [case.alpha] * stages
    rows_of = {"fidelity": [], "consistency": [], "stage_loss": []}
    for i in range(stages):
        hidden = F.relu(F.linear(torch.cat((q, features), 1), w1[i], b1[i]))
        z = F.linear(hidden, w2[i], b2[i])
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        if o["divergence"] == "forward":
            fidelity = -_product(y, log_p).sum(-1)
            consistency = (_product(q, q.clamp(min=TINY).log()) - _product(q, log_p)).sum(-1)
        else:
            fidelity = _product(p, log_p - y.clamp(min=TINY).log()).sum(-1)
            consistency = _product(p, log_p - q.clamp(min=TINY).log()).sum(-1)
        a = alphas[i]
        for name, x in (("fidelity", fidelity), ("consistency", consistency),
                        ("stage_loss", a * fidelity + (1 - a) * consistency)):  # fmt: skip
            rows_of[name].append(torch.where(counts, x, 0.0).sum() / number)
        q = p.detach()
    found = {name: torch.stack(x) for name, x in rows_of.items()}
    loss = found["stage_loss"].sum()
    gradients = torch.autograd.grad(loss, (features, *weights))
    found |= {"loss": loss, "belief": q, "logits": z} | dict(
        zip(("features", *CascadeWeights._fields), gradients, strict=True)
    )
    return {name: x.detach() for name, x in found.items()}


def _product(a, b):
    """a b with 0 * -inf = 0, in the value and in the gradient."""
    return torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, b))


def assert_within_budget(found: dict[str, Tensor], case: Case) -> None:
    want, dtype = truth(case), case.features.dtype
    peer = truth(case, dtype)
    for name in NAMES:
        got, expected = found[name].double(), want[name]
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        scale = expected.abs().max() if expected.numel() else torch.zeros(())
        error = (got - expected).abs().max() if expected.numel() else torch.zeros(())
        allowed = (peer[name].double() - expected).abs().max() if expected.numel() else 0.0
        # One rounding more where a result is stored in half precision
        allowed = allowed + (ROUNDINGS if dtype.itemsize >= 4 else 2) * torch.finfo(dtype).eps / 2 * scale + 1e-30
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e} (largest {scale:.2e})"
