"""Check a contender, then time it with pytest-benchmark, for `pytest bench/ --benchmark-only`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND = 2e-3  # seconds: a fast call is repeated until a round takes this long
SECONDS = 0.5  # seconds for all rounds of one contender; at least 3 rounds are made even if they take longer


def timed(call: Callable[[], object]) -> Callable[[], object]:
    """Return a function that makes the call and, on a GPU, waits until it is done."""
    if DEVICE == "cpu":
        return call

    def wait():
        call()
        torch.cuda.synchronize()

    return wait


def seconds_of(call: Callable[[], object], calls: int = 1) -> float:
    """Return the mean seconds of a call over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def checked(benchmark, group: str, contender, call: Callable[[], object], check: Callable[[], dict]) -> dict:
    """Run the check, benchmark the call under the table title `group`, and return the errors that the check found.

    Skips the test if the contender cannot run here, unless the contender is ours or its results are wrong.
    """
    began = time.perf_counter()
    try:
        errors = check()  # the first call: torch.compile and Triton compile here
    except Exception as error:
        if contender.ours or isinstance(error, (AssertionError, torch.OutOfMemoryError)):
            raise
        pytest.skip(f"{contender.name} does not run here: {str(error).splitlines()[0][:200]}")
    checking, call = time.perf_counter() - began, timed(call)
    if checking > 2 * SECONDS and not contender.compiled:
        call_seconds = checking  # so slow that only the minimum of 3 rounds is made; no need to time it more exactly
    else:
        call_seconds = seconds_of(call, 2)
    calls = max(1, min(2000, int(ROUND / call_seconds)))
    benchmark.group = group
    benchmark.pedantic(call, rounds=max(3, min(50, int(SECONDS / (call_seconds * calls)))), iterations=calls)
    return errors


@functools.lru_cache(maxsize=1)
def case(module: ModuleType, size: tuple) -> tuple:
    """Return a problem of this size, its float64 results, its contenders by name, and why the others are left out.

    module: `head_contenders` or `cascade_contenders`.
    """
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
    benchmark.extra_info |= {"what": contender.description, "relative_errors": errors}
