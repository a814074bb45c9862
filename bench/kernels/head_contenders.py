"""Compute the loss and gradients of a belief head in every way we compare, and check the results.

The gradients are those of hidden (N, H), weight (C, H) and bias (C,). The prior is given as probabilities (N, C), is
None (uniform), or is another head, whose softmax is then part of the computation. A contender returns
(loss (), belief (N, C) or None, three gradients). The loss is the mean over rows. This file times nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.contenders import ALPHA, DTYPES, TOLERANCE, mixed, no_compiler, no_liger
from bench.lib.footprint import nbytes
from sid_kernels import belief_head_and_grad, fused_belief_head

PRIORS = ("given", "none", "head")
SIZES = ((4096, 256, 10, "float32"), (2048, 512, 1000, "float32"), (2048, 512, 32000, "float32"))  # N, H, C
GPU_SIZES = ((2048, 512, 32000, "bfloat16"), (8192, 2048, 128256, "bfloat16"))  # only on a GPU, besides SIZES


class Problem(NamedTuple):
    hidden: Tensor  # (N, H); hidden, weight and bias are leaves that require a gradient
    weight: Tensor  # (C, H)
    bias: Tensor  # (C,)
    prior: Tensor | tuple[Tensor, Tensor, Tensor] | None
    target: Tensor  # (N,) int64

    @property
    def kind(self) -> str:
        """Return which of PRIORS the prior is."""
        return "none" if self.prior is None else "head" if isinstance(self.prior, tuple) else "given"


def label(size: tuple) -> str:
    """Return the text that names a size in tables."""
    rows, width, classes, dtype, prior = size
    return f"belief head, N={rows} H={width} C={classes} {dtype}, prior {prior}"


def make_problem(size: tuple[int, int, int, str, str], device: str, seed: int = 0) -> Problem:
    """Return a random problem of a size: N, H, C, dtype and one of PRIORS.

    Logits have a standard deviation of about 2.
    """
    rows, width, classes, dtype, kind = size
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=DTYPES[dtype], device=device)
        for piece in values.split(4096):  # in pieces, so that no float32 copy of the whole exists
            piece.copy_(torch.randn(piece.shape, generator=generator, device=device).mul_(by))
        return values

    def head() -> tuple[Tensor, Tensor, Tensor]:
        return normal(rows, width), normal(classes, width, by=2 * width**-0.5), normal(classes, by=0.3)

    parameters, prior = head(), None
    if kind == "given":
        prior = normal(rows, classes, by=2.0)
        for piece in prior.split(1024):
            piece.copy_(piece.float().softmax(-1))
    elif kind == "head":
        prior = head()
    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    return Problem(*(x.requires_grad_() for x in parameters), prior, target)


class Run(NamedTuple):
    """A contender with its problem. The attributes are those of `cascade_contenders.Run`."""

    step: Callable[[], tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]]
    kept: int = 0  # bytes kept between calls: none

    @property
    def returned(self) -> int:
        """Return the bytes of loss, belief and gradients."""
        return nbytes(self.step())

    def clear(self) -> None:
        """Do nothing: a call keeps no gradients."""


class Contender(NamedTuple):
    name: str
    description: str
    call: Callable[[Problem], tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]]
    value: str = "loss"  # the entry of `Truth.values` that its loss equals: some omit terms constant in the logits
    target: str = "mixed"  # what the belief is trained toward: "mixed", or only "labels" or the "prior" (no biases)
    ours: bool = False
    compiled: bool = False
    replayed: bool = False

    def run(self, problem: Problem) -> Run:
        """Bind the contender to a problem."""
        return Run(functools.partial(self.call, problem))


# ---------------------------------------------------------------- the forms in PyTorch


def _prior(prior, logits: Tensor) -> Tensor:
    """Return the prior as probabilities (N, C). A uniform prior is expanded from one element."""
    if prior is None:
        return logits.new_full((), 1 / logits.shape[1]).expand_as(logits)
    if isinstance(prior, tuple):
        with torch.no_grad():
            return F.linear(*prior).softmax(-1)
    return prior


def four_op(hidden: Tensor, weight: Tensor, bias: Tensor, prior, target: Tensor) -> Tensor:
    """Return the loss as written in the paper, without a one-hot target: linear, log_softmax, nll_loss, kl_div."""
    log_p = F.log_softmax(F.linear(hidden, weight, bias), dim=-1)
    consistency = F.kl_div(log_p, _prior(prior, log_p), reduction="batchmean")
    return ALPHA * F.nll_loss(log_p, target) + (1 - ALPHA) * consistency


def collapsed(hidden: Tensor, weight: Tensor, bias: Tensor, prior, target: Tensor) -> Tensor:
    """Return the cross-entropy with the mixed target, whose gradients equal those of the local loss.

    With a uniform prior it is cross-entropy with smoothed labels.
    """
    logits = F.linear(hidden, weight, bias)
    if prior is None:
        return F.cross_entropy(logits, target, label_smoothing=1 - ALPHA)
    return F.cross_entropy(logits, mixed(_prior(prior, logits), target, ALPHA))


def with_gradients(form: Callable[..., Tensor]) -> Callable:
    """Return the contender that computes `form` and its three gradients."""

    def call(problem: Problem):
        loss = form(*problem)
        return loss.detach(), None, torch.autograd.grad(loss, problem[:3])

    return call


def liger_cross_entropy(problem: Problem):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(problem.hidden, problem.weight, problem.target, bias=problem.bias)
    return loss.detach(), None, torch.autograd.grad(loss, problem[:3])


def liger_distillation(problem: Problem):
    """Return loss and gradients of Liger-Kernel's fused Jensen-Shannon loss; at beta = 0 it is KL(prior || belief)."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    hidden, weight, _ = problem.prior
    loss = liger_fused_linear_jsd(problem.hidden, problem.weight, hidden, weight, None, 0.0)
    return loss.detach(), None, (*torch.autograd.grad(loss, problem[:2]), None)


# ---------------------------------------------------------------- ours


def without_autograd(problem: Problem):
    result, gradients = belief_head_and_grad(*problem, ALPHA, return_belief=False)
    return result.loss, None, tuple(gradients)


def through_autograd(problem: Problem, return_belief: bool):
    result = fused_belief_head(*problem, ALPHA, return_belief=return_belief)
    return result.loss.detach(), result.belief, torch.autograd.grad(result.loss, problem[:3])


# ---------------------------------------------------------------- the list

DIRECT, FUSED, BELIEF = "belief_head_and_grad", "fused_belief_head", "fused_belief_head, with belief"
EAGER, COLLAPSED = "eager four-op", "eager collapsed"
COMPILED, COMPILED_COLLAPSED = "compiled four-op", "compiled collapsed"
LIGER, LIGER_JSD = "liger linear cross-entropy", "liger linear JSD"


def names() -> list[str]:
    return [DIRECT, FUSED, BELIEF, EAGER, COLLAPSED, COMPILED, COMPILED_COLLAPSED, LIGER, LIGER_JSD]


def contenders(device: str, problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that can run, by name, and the reason for each one left out.

    Code that torch.compile made for earlier sizes is dropped.
    """
    torch._dynamo.reset()
    part = functools.partial
    listed = [
        Contender(DIRECT, "ours without autograd, no belief stored", without_autograd, ours=True),
        Contender(FUSED, "ours through autograd, no belief stored", part(through_autograd, return_belief=False),
                  ours=True),
        Contender(BELIEF, "ours through autograd; unlike the others it stores the belief",
                  part(through_autograd, return_belief=True), ours=True),
        Contender(EAGER, "linear, log_softmax, nll_loss, kl_div, backward", with_gradients(four_op)),
        Contender(COLLAPSED, "linear, cross_entropy with the mixed target, backward", with_gradients(collapsed),
                  "cross_entropy"),
    ]  # fmt: skip
    left_out = {}
    for name, form, value in ((COMPILED, four_op, "loss"), (COMPILED_COLLAPSED, collapsed, "cross_entropy")):
        if reason := no_compiler(device):
            left_out[name] = reason
        else:
            run = with_gradients(torch.compile(form, dynamic=False))
            listed.append(
                Contender(name, f"{name[9:]} under torch.compile, this size alone", run, value, compiled=True)
            )
    if reason := no_liger(device):
        left_out |= dict.fromkeys((LIGER, LIGER_JSD), reason)
    else:
        description = "Liger-Kernel's; it does less: labels only, no prior"
        listed.append(Contender(LIGER, description, liger_cross_entropy, "labels", "labels"))
        if problem.kind == "head":
            description = "Liger-Kernel's; it does less: the prior only, no labels, no biases"
            listed.append(Contender(LIGER_JSD, description, liger_distillation, "prior", "prior"))
        else:
            left_out[LIGER_JSD] = "its prior must be another head"
    return {contender.name: contender for contender in listed}, left_out


# ---------------------------------------------------------------- the check

SAMPLE = 32  # rows, and classes, whose gradients are compared
PIECE = 1 << 22  # logits evaluated in float64 at a time


class Truth(NamedTuple):
    """The expected results in float64.

    `values` are means over all rows. Belief and dhidden are those of `rows`, dweight is that of `classes`, and dbias
    is complete.
    """

    rows: Tensor  # (R,)
    classes: Tensor  # (K,)
    values: dict[str, float]
    belief: Tensor  # (R, C)
    gradients: tuple[Tensor, Tensor, Tensor]  # (R, H), (K, H), (C,)


def truth(problem: Problem) -> Callable[[str], Truth]:
    """Return a function of `Contender.target` that gives the expected results, computed at its first call."""
    return functools.cache(functools.partial(_truth, problem))


@torch.no_grad()
def _truth(problem: Problem, target: str) -> Truth:
    (count, width), number = problem.hidden.shape, problem.weight.shape[0]
    device = problem.target.device
    rows = torch.linspace(0, count - 1, min(count, SAMPLE), device=device).round().long()
    spread = torch.linspace(0, number - 1, min(number, SAMPLE), device=device).round().long()
    classes = torch.cat((spread, problem.target[:SAMPLE])).unique()  # a class that no row has gets a tiny gradient
    biased, weight = target != "prior", problem.weight.double()
    share = {"mixed": ALPHA, "labels": 1.0, "prior": 0.0}[target]
    prior_weight = problem.prior[1].double() if problem.kind == "head" else None

    def evaluate(part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = problem.hidden[part].double()
        log_p = torch.addmm(problem.bias.double() * biased, hidden, weight.t()).log_softmax(-1)
        if problem.kind == "head":
            bias = problem.prior[2].double() * biased
            q = torch.addmm(bias, problem.prior[0][part].double(), prior_weight.t()).softmax(-1)
        else:
            q = (
                log_p.new_full((), 1 / number).expand_as(log_p)
                if problem.prior is None
                else problem.prior[part].double()
            )
        m = (1 - share) * q
        m = m.scatter_add(1, problem.target[part, None], torch.full_like(m[:, :1], share))
        mass = m.sum(-1, keepdim=True)  # 1 up to the prior's rounding
        return log_p, q, m, (mass * log_p.exp() - m) / count

    sums = dict.fromkeys(("loss", "cross_entropy"), 0.0)
    dweight, dbias = weight.new_zeros(len(classes), width), weight.new_zeros(number)
    for start in range(0, count, step := max(1, PIECE // number)):
        part = slice(start, start + step)
        log_p, q, m, dlogits = evaluate(part)
        cross_entropy = float(-(m * log_p).sum())
        sums["cross_entropy"] += cross_entropy
        sums["loss"] += cross_entropy + (1 - share) * float(torch.special.xlogy(q, q).sum())
        dweight += dlogits[:, classes].t() @ problem.hidden[part].double()
        dbias += dlogits.sum(0)
    values = {name: x / count for name, x in sums.items()}
    values |= {"labels": values["cross_entropy"], "prior": values["loss"]}
    log_p, _, _, dlogits = evaluate(rows)
    return Truth(rows, classes, values, log_p.exp(), (dlogits @ weight, dweight, dbias))


def check(contender: Contender, run: Run, problem: Problem, expected: Callable[[str], Truth]) -> dict[str, float]:
    """Run a contender once and return its relative errors. Raises AssertionError if one is above TOLERANCE."""
    truth_values = expected(contender.target)
    loss, belief, (dhidden, dweight, dbias) = run.step()
    value = truth_values.values[contender.value]
    errors = {"loss": abs(float(loss) - value) / max(1.0, abs(value))}
    outputs = {"belief": None if belief is None else belief[truth_values.rows], "hidden": dhidden[truth_values.rows],
               "weight": dweight[truth_values.classes], "bias": dbias}  # fmt: skip
    for (name, output), reference in zip(outputs.items(), (truth_values.belief, *truth_values.gradients), strict=True):
        if output is not None:
            assert output.shape == reference.shape, f"{contender.name}: {name} has shape {tuple(output.shape)}"
            errors[name] = float((output.detach().double() - reference).norm() / reference.norm())
    for name, error in errors.items():
        allowed = TOLERANCE[problem.hidden.dtype]
        assert error <= allowed, f"{contender.name}: {name} is off by {error:.1e} of float64's, allowed {allowed:.0e}"
    return errors
