"""Run small problems through every path of the CUDA kernels, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/gpu/sanitizer_case.py

Each result is compared with that of the reference backend in float64 on the CPU, so that wrong values fail the run even
if the sanitizer reports nothing. Exit status: 0 all values are right, 1 a value is wrong, 2 the backend cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch

from sid_kernels import fused_local_loss, local_loss_and_grad
from sid_kernels.core import backends

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 3e-5, BF16: 2.0**-7, F16: 2.0**-10}  # relative to the largest value; 16 bits: the last bit


class Case(NamedTuple):
    path: str  # the kernel path that it tests (csrc/cuda/plan.h)
    rows: int
    classes: int
    logits: torch.dtype = F32
    prior: torch.dtype | None = F32
    soft: bool = False
    options: dict[str, Any] = {}
    alpha: float | str = 0.5
    padding: int = 0  # elements between rows
    in_place: bool = False


SMOOTH = {"label_smoothing": 0.1}
REVERSE = SMOOTH | {"divergence": "reverse"}
CASES = (
    Case("one lane a row", 37, 4),
    Case("some lanes a row", 37, 10),
    Case("some lanes a row, in place", 37, 10, in_place=True),
    Case("some lanes a row, soft", 19, 100, BF16, BF16, soft=True),
    Case("a warp a row", 5, 1000, alpha="rows"),
    Case("a warp a row, odd", 5, 1001, F16, F16, options=SMOOTH),
    Case("a warp a row, padded rows", 5, 257, padding=3),
    Case("a warp a row, mixed types", 7, 203, BF16, F32, alpha="scalar"),
    Case("a warp a row, no prior", 7, 333, BF16, None, options={"reduction": "none"}),
    Case("labels counted by a launch of their own", 5003, 10),
    Case("a block a row", 9, 3000, options=REVERSE),
    Case("a block a row, odd", 9, 5001, BF16, BF16),
    Case("a block a row, mixed types", 3, 1501, F32, BF16, soft=True),
    Case("a block a row, many rows", 700, 1500, BF16, BF16, options={"reduction": "sum"}),
    Case("a cluster a row", 150, 10000),
    Case("a cluster a row, few rows", 1, 32000, BF16, BF16),
    Case("a cluster a row, odd, in place", 3, 50257, BF16, BF16, in_place=True),
    Case("a cluster a row, soft, reverse", 3, 20000, soft=True, options={"divergence": "reverse"}),
    Case("partly held", 2, 140000),
    Case("partly held, odd, in place", 2, 140001, in_place=True),
    Case("partly held, half", 1, 270000, BF16, BF16, options=REVERSE),
    Case("partly held, mixed types", 2, 70001, BF16, F32, soft=True),
)


def tensors(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Any]:
    """Return logits, prior, target and alpha on the CPU. With labels as targets, every fifth row is ignored."""
    g = torch.Generator().manual_seed(seed)
    shape = (case.rows, case.classes)
    logits = torch.randn(shape, generator=g).mul(3.0).to(case.logits)
    prior = None if case.prior is None else torch.randn(shape, generator=g).softmax(-1).to(case.prior)
    if case.soft:
        target = torch.randn(shape, generator=g).softmax(-1).to(case.logits)
    else:
        target = torch.randint(0, case.classes, (case.rows,), generator=g)
        target[1::5] = -100
    alpha = {"rows": torch.rand(case.rows, generator=g), "scalar": torch.tensor(0.3)}.get(case.alpha, case.alpha)
    return logits, prior, target, alpha


def copy_to(x: Any, device: str, padding: int = 0) -> Any:
    """Return a copy of a tensor on the device, with `padding` NaNs between its rows; other values as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    if not padding:
        return x.to(device, copy=True)
    wide = torch.full((x.shape[0], x.shape[1] + padding), torch.nan, dtype=x.dtype, device=device)
    wide[:, : x.shape[1]] = x.to(device)
    return wide[:, : x.shape[1]]


def run(case: Case, backend: str, seed: int) -> str | None:
    """Run a case and return a text that says which value is wrong, or None if all are right."""
    logits, prior, target, alpha = tensors(case, seed)
    exact = (x.double() if x is not None and x.is_floating_point() else x for x in (logits, prior, target))
    expected, expected_grad = local_loss_and_grad(*exact, alpha, backend="reference", **case.options)
    device = backends.BACKENDS[backend][0]
    z = copy_to(logits, device, case.padding)
    arguments = (copy_to(prior, device, case.padding), copy_to(target, device), copy_to(alpha, device))
    options = case.options | {"backend": backend}
    result, grad = local_loss_and_grad(z, *arguments, out=z if case.in_place else None, **options)
    comparisons = [("dlogits", grad, expected_grad)]
    comparisons += [(name, getattr(result, name), getattr(expected, name)) for name in result._fields]
    if not case.in_place:  # a backward pass with a gradient other than 1 runs the kernel that scales
        z.requires_grad_()
        loss = fused_local_loss(z, *arguments, **options).loss
        (scaled,) = torch.autograd.grad(loss, z, torch.full_like(loss, 3.0))
        comparisons.append(("scaled dlogits", scaled / 3.0, expected_grad))
    for name, value, reference in comparisons:
        allowed = TOLERANCE[value.dtype] * (2.0 if "dlogits" in name else 1.0)
        error = float((value.cpu().double() - reference).abs().max() / max(float(reference.abs().max()), 1e-30))
        if not error <= allowed:  # also true if the error is NaN
            return f"{name} is off by {error:.1e}, allowed {allowed:.1e}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    backend = parser.parse_args().backend
    if (reason := backends.unavailable(backend)) is not None:
        print(f"backend {backend} cannot be used: {reason}", file=sys.stderr)
        return 2
    wrong = 0
    for seed, case in enumerate(CASES):
        error = run(case, backend, seed)
        wrong += error is not None
        print(f"({case.rows}, {case.classes}) {case.path}: {error or 'ok'}", flush=True)
    print(f"{len(CASES)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
