"""The cascade on a CPU: one product for the features' part of every stage, one C++ call for all that runs along it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..core import cpu
from ..core.checks import label_error
from ..core.native import matrix
from .problem import CascadePass, CascadeProblem, CascadeWeights

KEPT_BYTES = 17 << 20  # a group of stages and its losses; a single stage may be larger, and is not kept


class _Scratch(threading.local):
    """Memory for what only lives until the products are made, kept from call to call: at most KEPT_BYTES.

    Fresh from the system, it would be entered page by page at every step, which costs as much as the kernel (measured).
    """

    def __init__(self):
        self.memory = self.new(0)

    @staticmethod
    def new(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device="cpu")

    def take(self, sizes: list[int]) -> list[Tensor]:
        """Flat float32 tensors of these sizes, each on a cache line of its own; what was taken before is lost."""
        places = [-(-size // 16) * 16 for size in sizes]
        memory = self.memory if self.memory.numel() >= sum(places) else self.new(sum(places))
        if memory.nbytes <= KEPT_BYTES:
            self.memory = memory
        return [part[:size] for part, size in zip(memory[: sum(places)].split(places), sizes, strict=True)]


_scratch = _Scratch()


def release() -> None:
    """Give back the memory this thread keeps between calls."""
    _scratch.memory = _scratch.new(0)


def takes(problem: CascadeProblem) -> bool:
    return problem.features.dtype is torch.float32 and problem.features.is_cpu and cpu.unavailable() is None


def run(problem: CascadeProblem, into: CascadeWeights | None) -> CascadePass:
    """All but `logits` and `losses` lies in memory that the next call from this thread takes again.

    The gradients of the biases are written into `into`; those of the weights are the caller's products.
    """
    features, weights, grad = problem.features, problem.weights, problem.need_grad
    stages, width, classes = weights.sizes
    rows = features.shape[0]
    units, empty = stages * width, features.new_empty
    logits, losses = empty(rows, classes), empty(3, stages)
    hidden, beliefs, *more = _scratch.take([units * rows, stages * rows * classes] * (1 + grad))
    dhidden, dlogits = more or (None, None)
    # Rows lie side by side, so that the kernel reads weights as they are and no thread meets another.
    feature_part = weights.hidden_weight.view(units, -1)[:, classes:]  # (L * H, D)
    torch.mm(feature_part, features.t(), out=hidden.view(units, rows))
    tensor_alpha = isinstance(problem.alpha, Tensor)
    if rows:
        bad = cpu.compiled.cascade(
            stages, rows, classes, width,
            weights.hidden_weight.data_ptr(), weights.hidden_weight.shape[2], weights.hidden_bias.data_ptr(),
            weights.logits_weight.data_ptr(), weights.logits_bias.data_ptr(),
            matrix(problem.prior),
            0 if problem.labels is None else problem.labels.data_ptr(),
            matrix(problem.soft),
            problem.alpha.data_ptr() if tensor_alpha else 0, 0.0 if tensor_alpha else problem.alpha,
            problem.label_smoothing, problem.ignore_index, problem.reverse, problem.reduction == "mean",
            hidden.data_ptr(), dhidden.data_ptr() if grad else 0, beliefs.data_ptr(), dlogits.data_ptr() if grad else 0,
            logits.data_ptr(), losses.data_ptr(), into.hidden_bias.data_ptr() if grad else 0,
            into.logits_bias.data_ptr() if grad else 0, torch.get_num_threads(),
        )  # fmt: skip
        if bad is not None:
            raise label_error(*bad, classes, problem.ignore_index)
    else:
        losses.zero_()
        for bias in (into.hidden_bias, into.logits_bias) if grad else ():
            bias.zero_()
    beliefs = beliefs.view(stages, rows, classes)
    if not grad:
        return CascadePass(losses, beliefs, logits, None, None, None)
    hidden, dhidden = (x.view(stages, width, rows).transpose(1, 2) for x in (hidden, dhidden))
    return CascadePass(losses, beliefs, logits, dlogits.view(stages, rows, classes), hidden, dhidden, has_biases=True)
