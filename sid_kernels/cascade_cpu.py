"""The cascade on a CPU: one product for the features' part of every stage, one C++ call for all that runs along it."""

from __future__ import annotations

import torch

from . import cpu
from .cascade_problem import CascadePass, CascadeProblem
from .native import matrix
from .problem import label_error

_NOTHING = (0, 0, 0)


def takes(problem: CascadeProblem) -> bool:
    return problem.features.dtype is torch.float32 and problem.features.is_cpu and cpu.unavailable() is None


def run(problem: CascadeProblem) -> CascadePass:
    features, weights = problem.features, problem.weights
    stages, width, classes = weights.sizes
    rows = features.shape[0]
    empty = features.new_empty
    # Rows lie side by side: (L, H, B). The kernel reads weights as they are, and no thread meets another.
    hidden = empty(stages, width, rows)
    feature_part = weights.hidden_weight.view(stages * width, -1)[:, classes:]  # (L * H, D)
    torch.mm(feature_part, features.t(), out=hidden.view(stages * width, rows))
    dhidden = empty(stages, width, rows) if problem.need_grad else None
    dlogits = empty(stages, rows, classes) if problem.need_grad else None
    beliefs, logits, losses = empty(stages, rows, classes), empty(rows, classes), empty(3, stages, rows)
    tensor_alpha = isinstance(problem.alpha, torch.Tensor)
    bad = cpu._C.cascade(
        stages, rows, classes, width,
        weights.hidden_weight.data_ptr(), weights.hidden_weight.shape[2], weights.hidden_bias.data_ptr(),
        weights.logits_weight.data_ptr(), weights.logits_bias.data_ptr(),
        _NOTHING if problem.prior is None else matrix(problem.prior),
        0 if problem.labels is None else problem.labels.data_ptr(),
        _NOTHING if problem.soft is None else matrix(problem.soft),
        problem.alpha.data_ptr() if tensor_alpha else 0, 0.0 if tensor_alpha else problem.alpha,
        problem.label_smoothing, problem.ignore_index, problem.reverse, problem.reduction == "mean",
        hidden.data_ptr(), 0 if dhidden is None else dhidden.data_ptr(), beliefs.data_ptr(),
        0 if dlogits is None else dlogits.data_ptr(), logits.data_ptr(), losses.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if bad is not None:
        raise label_error(*bad, classes, problem.ignore_index)
    if not problem.need_grad:
        return CascadePass(losses, beliefs, logits, None, None, None)
    return CascadePass(losses, beliefs, logits, hidden.transpose(1, 2), dlogits, dhidden.transpose(1, 2))
