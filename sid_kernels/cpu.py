"""The CPU backend: C++ kernels for AVX-512, AVX2 and a baseline, chosen at run time."""

from __future__ import annotations

import torch

from .native import pack
from .problem import Problem, Result, label_error

try:
    from . import _C

    _missing = None
except ImportError as error:
    _C, _missing = None, f"the compiled module sid_kernels._C did not load ({error})"


def unavailable() -> str | None:
    return _missing


def run(problem: Problem) -> Result:
    result, arguments = pack(problem)
    bad = _C.local_loss(*arguments, torch.get_num_threads())
    if bad is not None:
        raise label_error(*bad, problem.logits.shape[1], problem.ignore_index)
    return result
