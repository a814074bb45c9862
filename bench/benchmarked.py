"""How `pytest bench/ --benchmark-only` times a contender: checked first, then in as many calls as its time allows."""

from __future__ import annotations

import time
from collections.abc import Callable

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
