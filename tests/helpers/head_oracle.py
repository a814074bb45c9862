"""Compute a belief head's reference results: a plain linear layer in float64 under the oracle of the loss.

The loss of the logits is tested with oracle.py; here the layer under it is. The rule is the same: no further from
float64 than PyTorch in the same dtype, plus a few roundings of what a result is summed from.
"""

import torch
import torch.nn.functional as F

from helpers.oracle import Case, oracle
from sid_kernels import PriorHead, belief_head_and_grad

SIZES = [(1, 1, 1), (9, 7, 5), (70, 33, 10), (33, 20, 100), (20, 8, 3000)]
OPTIONS = [
    {},
    {"soft": True, "alpha": "rows"},
    {"label_smoothing": 0.1, "reduction": "sum", "bias": False},
    {"ignored": 3},
    {"divergence": "reverse", "label_smoothing": 0.1},
]
PRIORS = ("none", "tensor", "head")
RESULTS = ("loss", "fidelity", "consistency", "belief", "hidden", "weight", "bias")


class Problem:
    """Arguments of one call, and what they give in another dtype."""

    def __init__(self, rows, width, classes, *, dtype=torch.float32, prior="tensor", soft=False, alpha=0.3, ignored=0,
                 bias=True, seed=0, **options):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, by=1.0):
            return (torch.randn(*shape, generator=g) * by).to(dtype)

        self.hidden, self.weight = normal(rows, width), normal(classes, width, by=2 * width**-0.5)
        self.bias = normal(classes, by=0.3) if bias else None
        self.head = PriorHead(normal(rows, 6), normal(classes, 6, by=0.8), normal(classes, by=0.3))
        self.kind, self.options = prior, options
        self.given = F.softmax(F.linear(*self.head).double(), -1).to(dtype)
        self.prior = {"none": None, "tensor": self.given, "head": self.head}[prior]
        if soft:
            self.target = normal(rows, classes, by=2.0).float().softmax(-1).to(dtype)
        else:
            self.target = torch.randint(0, classes, (rows,), generator=g)
            self.target[:ignored] = options.get("ignore_index", -100)
        self.alpha = torch.rand(rows, generator=g) if alpha == "rows" else alpha

    def run(self, **changes):
        result, gradients = belief_head_and_grad(
            self.hidden, self.weight, self.bias, self.prior, self.target, self.alpha, **(self.options | changes)
        )
        return result._asdict() | gradients._asdict()

    def expected(self, dtype):
        """Compute the oracle of the loss over logits of a plain linear layer, and gradients by the chain rule."""
        h, w = self.hidden.to(dtype), self.weight.to(dtype)
        logits = F.linear(h, w, None if self.bias is None else self.bias.to(dtype))
        prior = {"none": None, "tensor": self.given.to(dtype)}.get(self.kind)
        if self.kind == "head":
            prior = F.softmax(F.linear(*(x.to(dtype) for x in self.head)), -1)
        actual = oracle(Case(logits, prior, self.target, self.alpha, self.options), dtype)
        dz, size = actual.dlogits, actual.size["dlogits"]
        # What each result is summed from, all terms positive: roundings are in proportion to it, not to the result.
        self.size = {name: actual.size[name].max() for name in RESULTS[:4] if actual.size[name].numel()} | {
            "hidden": size @ w.abs(), "weight": size.t() @ h.abs(), "bias": size.sum(0),
        }  # fmt: skip
        return {
            "loss": actual.loss, "fidelity": actual.fidelity, "consistency": actual.consistency, "belief": actual.belief,
            "hidden": dz @ w, "weight": dz.t() @ h, "bias": None if self.bias is None else dz.sum(0),
        }  # fmt: skip


def assert_within_budget(found, problem, names=RESULTS, roundings=32):
    dtype = problem.hidden.dtype
    peer, expected = problem.expected(dtype), problem.expected(torch.float64)
    for name in names:
        if expected[name] is None:
            assert found[name] is None, name
            continue
        got = found[name].double()
        assert got.shape == expected[name].shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected[name].shape)}"
        if not got.numel():
            continue
        error, scale = (got - expected[name]).abs().max(), problem.size[name].max()
        allowed = (
            (peer[name].double() - expected[name]).abs().max().nan_to_num(0.0)
        )  # float16 cannot hold the oracle's floor
        # Half precision: a rounding of the stored logits, of their gradient and of the result, each relative to its own size
        allowed = allowed + (roundings if dtype.itemsize >= 4 else 8) * torch.finfo(dtype).eps / 2 * scale + 1e-30
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e} (largest {scale:.2e})"
