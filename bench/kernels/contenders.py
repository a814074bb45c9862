"""Compute loss, belief and gradient of the logits of one SID stage in every way we compare, and check the results.

Every contender is a function of (logits (N, C), prior (N, C), target (N,) labels, alpha) and returns
(loss (), belief (N, C), gradient of the logits (N, C)). The loss is the mean over rows. `contenders` lists those that
can run here and says why the others cannot. This file times nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sid_kernels import fused_local_loss, local_loss_and_grad
from sid_kernels.core import backends

ALPHA = 0.5
SIZES = ((128, 10), (128, 100), (4096, 1000), (2048, 32000))  # (N, C)
GPU_SIZES = ((65536, 1000), (8192, 32000), (8192, 128256))  # timed only on a GPU, besides SIZES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The reference backend is timed up to this many logits; for more it takes long and tells nothing new.
REFERENCE_ELEMENTS = 1 << 23

# ---------------------------------------------------------------- what is computed


class Problem(NamedTuple):
    logits: Tensor  # (N, C), a leaf that requires a gradient; half of `both`
    prior: Tensor  # (N, C), the other half
    target: Tensor  # (N,) int64
    both: Tensor  # (2, N, C)

    @property
    def minimum_traffic(self) -> int:
        """Return the bytes that must move: logits, prior and labels read once, belief and gradient written once."""
        return 2 * _bytes(self.both) + _bytes(self.target)

    @property
    def clone_traffic(self) -> int:
        """Return the bytes that `clone` moves: logits and prior, read once and written once."""
        return 2 * _bytes(self.both)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def make_problem(rows: int, classes: int, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Return random logits with a standard deviation of 2, priors that sum to 1, and labels."""
    generator = torch.Generator(device).manual_seed(seed)
    both = torch.empty(2, rows, classes, dtype=dtype, device=device)
    for half, probabilities in ((both[0], False), (both[1], True)):
        for start in range(0, rows, 1024):  # in pieces, so that no float32 copy of the whole exists
            piece = half[start : start + 1024]
            values = torch.randn(piece.shape, generator=generator, device=device).mul_(2.0)
            piece.copy_(values.softmax(-1) if probabilities else values)
    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    return Problem(both[0].detach().requires_grad_(), both[1], target, both)


class Contender(NamedTuple):
    name: str
    description: str
    run: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]] | None  # None: clone
    value: str = "loss"  # the entry of `Truth.values` that its loss equals: some omit terms constant in the logits
    ours: bool = False
    compiled: bool = False
    waits: bool = False  # the call waits for the GPU, so it cannot be captured in a graph

    def bind(self, problem: Problem) -> Callable[[], object]:
        """Return the call to be timed: a function of no arguments."""
        if self.run is None:
            return problem.both.clone
        return functools.partial(self.run, problem.logits, problem.prior, problem.target, ALPHA)


# ---------------------------------------------------------------- the forms in PyTorch: loss and belief


def four_op(logits: Tensor, prior: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return loss and belief as written in the paper: log_softmax, two kl_div, softmax."""
    y = F.one_hot(target, logits.shape[-1]).to(logits.dtype)
    log_p = F.log_softmax(logits, dim=-1)
    fidelity = F.kl_div(log_p, y, reduction="batchmean")
    consistency = F.kl_div(log_p, prior, reduction="batchmean")
    return alpha * fidelity + (1 - alpha) * consistency, F.softmax(logits.detach(), dim=-1)


def collapsed(logits: Tensor, prior: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy with the mixed target, and the belief.

    The gradient equals that of the local loss; the value lacks the entropy of the prior.
    """
    return F.cross_entropy(logits, mixed(prior, target, alpha)), F.softmax(logits.detach(), dim=-1)


def mixed(prior: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Return the mixed target alpha y + (1 - alpha) q, without a one-hot y in memory.

    Under torch.compile the mixed target is not stored either.
    """
    if torch.compiler.is_compiling():
        y = torch.arange(prior.shape[-1], device=prior.device) == target[:, None]
        return (1 - alpha) * prior + alpha * y.to(prior.dtype)
    mixed = (1 - alpha) * prior
    return mixed.scatter_add_(1, target[:, None], torch.full_like(mixed[:, :1], alpha))


def with_gradient(form: Callable) -> Callable:
    """Return the contender that computes `form` and the gradient of its logits.

    It calls autograd.grad and not .backward(): in training, logits are no leaf, so no .grad is filled.
    """

    def run(logits, prior, target, alpha):
        loss, belief = form(logits, prior, target, alpha)
        return loss, belief, torch.autograd.grad(loss, logits)[0]

    return run


def liger_form() -> Callable:
    """Return a form that calls Liger-Kernel's kl_div with the mixed target, on a log_softmax that is used twice.

    It is the nearest that Liger-Kernel has; none of its operations takes a prior.
    """
    from liger_kernel.transformers.functional import liger_kl_div

    def form(logits, prior, target, alpha):
        log_p = F.log_softmax(logits, dim=-1)
        loss = liger_kl_div(log_p, mixed(prior, target, alpha), reduction="batchmean")
        return loss, log_p.detach().exp()

    return form


# ---------------------------------------------------------------- ours


def through_autograd(logits, prior, target, alpha, backend="auto"):
    if backend == "auto":
        loss, belief, _, _ = fused_local_loss(logits, prior, target, alpha)
    else:
        loss, belief, _, _ = fused_local_loss(logits, prior, target, alpha, backend=backend)
    return loss, belief, torch.autograd.grad(loss, logits)[0]


def without_autograd(logits, prior, target, alpha, backend="auto"):
    if backend == "auto":
        (loss, belief, _, _), dlogits = local_loss_and_grad(logits, prior, target, alpha)
    else:
        (loss, belief, _, _), dlogits = local_loss_and_grad(logits, prior, target, alpha, backend=backend)
    return loss, belief, dlogits


# ---------------------------------------------------------------- the list

CLONE, FUSED, DIRECT = "clone", "fused_local_loss", "local_loss_and_grad"
ALTERNATIVES = ("eager four-op", "eager collapsed", "compiled four-op", "compiled collapsed", "liger kl_div")


def names() -> list[str]:
    """Return the names of all contenders, also of those that cannot run on this machine."""
    ours = [f"{name}[{backend}]" for backend in backends.BACKENDS for name in (FUSED, DIRECT)]
    return [CLONE, *ALTERNATIVES, FUSED, DIRECT, *ours]


def contenders(device: str, rows: int, classes: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that can run at this size, by name, and the reason for each one left out.

    `fused_local_loss` and `local_loss_and_grad` are called as users call them (backend "auto"); a name in brackets is
    a usable backend that "auto" does not choose. Code that torch.compile made for earlier sizes is dropped.
    """
    torch._dynamo.reset()  # every size is compiled separately, and the compiler limits how many versions it keeps
    auto = backends.automatic(device, rows * classes)
    listed = [
        Contender(CLONE, "a copy of logits and prior in one call: as many bytes as the op must move", None),
        Contender("eager four-op", "one-hot, log_softmax, two kl_div, softmax, backward", with_gradient(four_op)),
        Contender("eager collapsed", "cross_entropy with the mixed target, softmax, backward",
                  with_gradient(collapsed), "cross_entropy"),
        Contender(FUSED, f"ours through autograd, backend auto: {auto}", through_autograd, ours=True),
        Contender(DIRECT, f"ours without autograd, backend auto: {auto}", without_autograd, ours=True),
    ]  # fmt: skip
    left_out = {}
    for form, value in ((four_op, "loss"), (collapsed, "cross_entropy")):
        name = "compiled " + {four_op: "four-op", collapsed: "collapsed"}[form]
        if reason := no_compiler(device):
            left_out[name] = reason
            continue
        run = with_gradient(torch.compile(form, dynamic=False))
        listed.append(Contender(name, f"{name[9:]} under torch.compile, this size alone", run, value, compiled=True))
    if reason := no_liger(device):
        left_out["liger kl_div"] = reason
    else:
        description = "Liger-Kernel's kl_div to the mixed target, on a log_softmax, and exp"
        listed.append(Contender("liger kl_div", description, with_gradient(liger_form()), "kl", waits=True))
    for backend, devices in backends.BACKENDS.items():
        reason = backends.unavailable(backend)
        if reason is None and device not in devices:
            reason = f"backend {backend} runs on {devices[0]}"
        if reason is None and backend == "reference" and rows * classes > REFERENCE_ELEMENTS:
            reason = f"backend reference is timed up to {REFERENCE_ELEMENTS} logits"
        for name, run in ((FUSED, through_autograd), (DIRECT, without_autograd)):
            if backend == auto:
                left_out[f"{name}[{backend}]"] = f"{name} already runs this backend at this size"
            elif reason is not None:
                left_out[f"{name}[{backend}]"] = reason
            else:
                description = f"ours {'through' if name == FUSED else 'without'} autograd, backend {backend}"
                run = functools.partial(run, backend=backend)
                listed.append(Contender(f"{name}[{backend}]", description, run, ours=True))
    by_name = {contender.name: contender for contender in listed}
    return {name: by_name[name] for name in names() if name in by_name}, left_out


def no_compiler(device: str) -> str | None:
    """Return why torch.compile cannot be used, or None if it can."""
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


def no_liger(device: str) -> str | None:
    """Return why Liger-Kernel cannot be used, or None if it can."""
    if device == "cpu":
        return "Liger-Kernel runs on GPUs only"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed (pip install -e .[liger])"
    return None


# ---------------------------------------------------------------- the check

# Allowed norm of the error relative to the norm of the result. float32: sums of 10^5 terms in any order. bfloat16: the
# last bit of a stored value is 2^-8 of it, and the forms in PyTorch round between their operations.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SAMPLE = 32  # rows whose belief and gradient are compared
PIECE = 1 << 22  # logits evaluated in float64 at a time


class Truth(NamedTuple):
    """The expected results in float64: means over all rows, and belief and gradient of the rows in `sample`."""

    values: dict[str, float]  # loss, cross_entropy, kl
    sample: Tensor  # (R,), the first and the last row among them
    belief: Tensor  # (R, C)
    dlogits: Tensor  # (R, C)


def truth(problem: Problem) -> Truth:
    """Compute the expected results in float64, piece by piece."""
    rows, classes = problem.logits.shape
    sums = dict.fromkeys(("loss", "cross_entropy", "kl"), 0.0)
    step = max(1, PIECE // classes)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        log_p, q, mixed = _in_float64(problem, piece)
        cross_entropy = float(-(mixed * log_p).sum())
        sums["cross_entropy"] += cross_entropy
        sums["kl"] += cross_entropy + float(torch.special.xlogy(mixed, mixed).sum())
        sums["loss"] += cross_entropy + (1 - ALPHA) * float(torch.special.xlogy(q, q).sum())
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), device=problem.target.device).round().long()
    log_p, _, mixed = _in_float64(problem, sample)
    mass = mixed.sum(-1, keepdim=True)  # 1 up to the prior's rounding
    return Truth({name: x / rows for name, x in sums.items()}, sample, log_p.exp(), (mass * log_p.exp() - mixed) / rows)


def _in_float64(problem: Problem, rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p, q and alpha y + (1 - alpha) q of some rows, in float64."""
    log_p = problem.logits.detach()[rows].double().log_softmax(-1)
    q = problem.prior[rows].double()
    y = F.one_hot(problem.target[rows], q.shape[-1])
    return log_p, q, ALPHA * y + (1 - ALPHA) * q


def check(contender: Contender, problem: Problem, expected: Truth) -> dict[str, float]:
    """Run a contender once and return its relative errors. Raises AssertionError if one is above TOLERANCE."""
    result = contender.bind(problem)()
    if contender.run is None:
        assert torch.equal(result, problem.both), "clone differs from what it copied"
        return {}
    loss, belief, dlogits = (x.detach() for x in result)
    expected_loss = expected.values[contender.value]
    errors = {"loss": abs(float(loss) - expected_loss) / max(1.0, abs(expected_loss))}
    for name, output in (("belief", belief), ("dlogits", dlogits)):
        assert output.shape == problem.logits.shape, f"{contender.name}: {name} has shape {tuple(output.shape)}"
        reference = getattr(expected, name)
        errors[name] = float((output[expected.sample].double() - reference).norm() / reference.norm())
    for name, error in errors.items():
        allowed = TOLERANCE[problem.logits.dtype]
        assert error <= allowed, f"{contender.name}: {name} is off by {error:.1e} of float64's, allowed {allowed:.0e}"
    return errors
