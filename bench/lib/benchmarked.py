"""How `pytest bench/ --benchmark-only` times a contender: checked first, then in as many calls as its time allows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND = 2e-3  # seconds of a round of a fast call
SECONDS = 0.5  # seconds the rounds of one contender may take together, at least 3 of them


def timed(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, waiting for the GPU."""
    if DEVICE == "cpu":
        return call

    def wait():
        call()
        torch.cuda.synchronize()

    return wait


def seconds_of(call: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def checked(benchmark, group: str, contender, call: Callable[[], object], check: Callable[[], dict]) -> dict:
    """The check, then the benchmark, in its group's table. Skips what is not ours and does not run here."""
    began = time.perf_counter()
    try:
        errors = check()  # compiles what is to be compiled
    except Exception as error:
        if contender.ours or isinstance(error, (AssertionError, torch.OutOfMemoryError)):
            raise
        pytest.skip(f"{contender.name} does not run here: {str(error).splitlines()[0][:200]}")
    checking, call = time.perf_counter() - began, timed(call)
    if checking > 2 * SECONDS and not contender.compiled:
        one = checking  # slow enough to know: 3 rounds
    else:
        one = seconds_of(call, 2)
    calls = max(1, min(2000, int(ROUND / one)))
    benchmark.group = group
    benchmark.pedantic(call, rounds=max(3, min(50, int(SECONDS / (one * calls)))), iterations=calls)
    return errors


@functools.lru_cache(maxsize=1)
def case(module: ModuleType, size: tuple) -> tuple:
    """Return a problem of a module of contenders, its true results, the contenders, and why others are left out."""
    problem = module.make_problem(size, DEVICE)
    return problem, module.truth(problem), *module.contenders(DEVICE, problem)


def measure(benchmark, module: ModuleType, size: tuple, name: str) -> None:
    """Check a contender of `head_contenders` or `cascade_contenders` against float64, then time it."""
    problem, expected, listed, left_out = case(module, size)
    if name not in listed:
        pytest.skip(left_out.get(name, "not on this machine"))
    contender = listed[name]
    run = contender.run(problem)
    group = f"{module.label(size)}, on {DEVICE}"
    errors = checked(benchmark, group, contender, run.step, lambda: module.check(contender, run, problem, expected))
    benchmark.extra_info |= {"what": contender.what, "relative_errors": errors}
