"""The cascade on a CPU: one product for the features' part of every stage, and one C++ call for all stages."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..core import cpu
from ..core.checks import label_error
from ..core.native import matrix, pack_spec
from .problem import CascadeActivations, CascadeOutputs, CascadeProblem, CascadeWeights

KEPT_BYTES = 17 << 20  # a group of stages and its losses; a single stage may be larger, and is not kept


class _Scratch(threading.local):
    """Memory for intermediate results, kept between the calls of a thread: at most KEPT_BYTES.

    The system would map new memory page by page in every step, which takes as long as the kernel (measured).
    """

    def __init__(self) -> None:
        self.memory = self.new(0)

    @staticmethod
    def new(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device="cpu")

    def take(self, sizes: list[int]) -> list[Tensor]:
        """Return flat float32 tensors of these sizes, each on its own cache lines; the next call reuses the memory."""
        padded = [-(-size // 16) * 16 for size in sizes]
        memory = self.memory if self.memory.numel() >= sum(padded) else self.new(sum(padded))
        if memory.nbytes <= KEPT_BYTES:
            self.memory = memory
        return [part[:size] for part, size in zip(memory[: sum(padded)].split(padded), sizes, strict=True)]


_scratch = _Scratch()


def release() -> None:
    """Free the memory that this thread keeps between calls."""
    _scratch.memory = _scratch.new(0)


def takes(problem: CascadeProblem) -> bool:
    """Return whether `run` takes this problem: float32 on a CPU."""
    return problem.features.dtype is torch.float32 and problem.features.is_cpu and cpu.unavailable() is None


def run(problem: CascadeProblem, gradients: CascadeWeights | None) -> CascadeOutputs:
    """Return the outputs of a cascade, and write the gradients of the biases to `gradients`.

    All outputs except `logits` and `losses` lie in memory that the next call from this thread reuses. The caller
    computes the gradients of the weights.

    Raises:
        IndexError: a label out of range; then nothing was written.
    """
    features, weights, spec = problem.features, problem.weights, problem.spec
    stages, hidden_dim, classes = weights.sizes
    rows, empty = features.shape[0], features.new_empty
    logits, losses = empty(rows, classes), empty(3, stages)
    sizes = [stages * hidden_dim * rows, stages * rows * classes]
    hidden, beliefs, *rest = _scratch.take(sizes if gradients is None else sizes * 2)
    # Rows are adjacent, so that the kernel reads the weights as they are and threads share no cache line.
    feature_part = weights.hidden_weight.view(stages * hidden_dim, -1)[:, classes:]  # (L * H, D)
    torch.mm(feature_part, features.t(), out=hidden.view(stages * hidden_dim, rows))
    if rows:
        addresses = [x.data_ptr() for x in weights]
        written = (0, 0, 0, 0)
        if gradients is not None:
            dhidden, dlogits = rest
            biases = (gradients.hidden_bias.data_ptr(), gradients.logits_bias.data_ptr())
            written = (dlogits.data_ptr(), dhidden.data_ptr(), *biases)
        bad = cpu.compiled.cascade(
            (stages, rows, classes, hidden_dim),
            (addresses[0], weights.hidden_weight.shape[2], *addresses[1:]),
            matrix(problem.prior),
            pack_spec(*spec),
            hidden.data_ptr(),
            (losses.data_ptr(), beliefs.data_ptr(), logits.data_ptr()),
            written,
            torch.get_num_threads(),
        )
        if bad is not None:
            row, label = bad
            raise label_error(row, label, classes, spec.options.ignore_index)
    else:
        losses.zero_()
        if gradients is not None:
            gradients.hidden_bias.zero_()
            gradients.logits_bias.zero_()
    beliefs = beliefs.view(stages, rows, classes)
    if gradients is None:
        return CascadeOutputs(losses, beliefs, logits, None)
    hidden, dhidden = (x.view(stages, hidden_dim, rows).transpose(1, 2) for x in (hidden, rest[0]))
    activations = CascadeActivations(rest[1].view(stages, rows, classes), hidden, dhidden)
    return CascadeOutputs(losses, beliefs, logits, activations, has_biases=True)
