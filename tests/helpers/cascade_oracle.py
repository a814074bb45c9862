"""Compute a cascade's reference results: its stages one by one in float64, by autograd, with `detach` between them.

It shares no code with the library. `assert_within_budget` is the rule of oracle.py for a chain of stages: no further
from float64 than the same formulas in PyTorch in the same dtype, plus a few roundings of what a result is summed from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import CascadeWeights, refine_cascade_and_grad

TINY = torch.finfo(torch.float32).tiny
NAMES = ("loss", "stage_loss", "fidelity", "consistency", "belief", "logits", "features", *CascadeWeights._fields)
# Allowed roundings of a result's terms, beyond PyTorch's own error. Stages amplify errors of earlier ones.
ROUNDINGS = 32


OPTIONS = [
    {},
    {"soft": True, "alpha": "stages"},
    {"label_smoothing": 0.1, "reduction": "sum"},
    {"ignored": 4, "prior": True},
    {"divergence": "reverse", "label_smoothing": 0.1, "alpha": "stages"},
    {"divergence": "reverse", "soft": True, "prior": True},
]
SIZES = [
    (1, 1, 1, 1, 2),
    (3, 9, 7, 5, 4),
    (2, 70, 33, 12, 1),
    (4, 130, 64, 16, 10),
    (2, 33, 40, 7, 100),
    (2, 65, 48, 20, 1000),
]


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
    terms, sizes = 0.0, {name: 0.0 for name in ("features", *CascadeWeights._fields)}
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
        with torch.no_grad():  # the same sums with all terms positive
            by_target, by_prior = _product(y, 1 - log_p), _product(q, 1 - log_p - q.clamp(min=TINY).log())
            if o["divergence"] == "reverse":
                by_target, by_prior = (p * (1 - log_p - x.clamp(min=TINY).log()) for x in (y, q))
            terms = max(terms, float((by_target + by_prior).sum(-1).max()) if rows else 0.0)
            dz = (p + y + q + (by_target + by_prior if o["divergence"] == "reverse" else 0.0)) / number
            dh = dz @ w2[i].abs()
            parts = (
                dh @ w1[i][:, classes:].abs(), dh.t() @ torch.cat((q, features), 1).abs(), dh.sum(0),
                dz.t() @ hidden.abs(), dz.sum(0),
            )  # fmt: skip
            for name, x in zip(sizes, parts, strict=True):
                largest = float(x.max()) if x.numel() else 0.0
                sizes[name] = sizes[name] + largest if name == "features" else max(sizes[name], largest)
        q = p.detach()
    actual = {name: torch.stack(x) for name, x in rows_of.items()}
    loss = actual["stage_loss"].sum()
    gradients = torch.autograd.grad(loss, (features, *weights))
    actual |= {"loss": loss, "belief": q, "logits": z} | dict(
        zip(("features", *CascadeWeights._fields), gradients, strict=True)
    )
    share = rows if o["reduction"] == "sum" else 1
    sizes |= dict.fromkeys(("stage_loss", "fidelity", "consistency"), share * terms)
    sizes |= {"loss": share * terms * stages, "belief": 1.0, "logits": float(z.detach().abs().max()) if rows else 0.0}
    return {name: x.detach() for name, x in actual.items()} | {"sizes": sizes}


def _product(a, b):
    """Return a b with 0 * -inf = 0, in the value and in the gradient."""
    return torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, b))


def assert_within_budget(found: dict[str, Tensor], case: Case) -> None:
    want, dtype = truth(case), case.features.dtype
    peer = truth(case, dtype)
    for name in NAMES:
        got, expected = found[name].double(), want[name]
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if not expected.numel():
            continue
        scale, error = want["sizes"][name], (got - expected).abs().max()
        allowed = (peer[name].double() - expected).abs().max()
        # One more rounding for results stored in half precision
        allowed = allowed + (ROUNDINGS if dtype.itemsize >= 4 else 2) * torch.finfo(dtype).eps / 2 * scale + 1e-30
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e} (largest {scale:.2e})"


def run(case: Case, backend="auto") -> dict[str, Tensor]:
    result, dfeatures, gradients = refine_cascade_and_grad(
        case.features, case.weights, case.target, case.alpha, prior=case.prior, backend=backend, **case.options
    )
    return result._asdict() | {"features": dfeatures} | gradients._asdict()
