"""`pytest bench/ --benchmark-only`: every contender at every size, grouped so that the tables compare.

Each is checked against float64 on its own inputs before it is timed. `report.py` measures the same more carefully,
interleaved; here one contender is timed after the other. On a GPU a timing ends when the GPU is done.
"""

import functools
import statistics
import time

import pytest
import torch
from contenders import CLONE, DTYPES, GPU_SIZES, SIZES, check, contenders, make_problem, names, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND = 2e-3  # seconds of a round of a fast call
SECONDS = 0.5  # seconds the rounds of one contender may take together, at least 3 of them


@functools.lru_cache(maxsize=1)  # the largest problems do not fit twice
def case(size, dtype):
    problem = make_problem(*size, DTYPES[dtype], DEVICE)
    return problem, truth(problem), *contenders(DEVICE, *size)


def timed(call):
    """`call`, waiting for the GPU."""
    if DEVICE == "cpu":
        return call

    def wait():
        call()
        torch.cuda.synchronize()

    return wait


def seconds_of(call, calls=1):
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@functools.lru_cache(maxsize=1)
def clone_seconds(size, dtype):
    """The median of clone, measured when it is wanted and its own benchmark was not selected."""
    problem, _, listed, _ = case(size, dtype)
    call = timed(listed[CLONE].bind(problem))
    calls = max(1, min(2000, int(ROUND / seconds_of(call, 2))))
    return statistics.median(seconds_of(call, calls) for _ in range(5))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_local_loss(benchmark, size, dtype, name):
    measure(benchmark, size, dtype, name)


@pytest.mark.skipif(DEVICE == "cpu", reason=f"{GPU_SIZES}: sizes of a GPU, and PyTorch sees none")
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", GPU_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_local_loss_large(benchmark, size, dtype, name):
    try:
        measure(benchmark, size, dtype, name)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"too large for this GPU: {str(error).splitlines()[0]}")


def measure(benchmark, size, dtype, name):
    problem, expected, listed, left_out = case(size, dtype)
    if name not in listed:
        pytest.skip(left_out.get(name, "not on this machine"))
    began = time.perf_counter()
    try:
        errors = check(listed[name], problem, expected)  # compiles what is to be compiled
    except Exception as error:
        if listed[name].ours or isinstance(error, (AssertionError, torch.OutOfMemoryError)):
            raise
        pytest.skip(f"{name} does not run here: {str(error).splitlines()[0][:200]}")
    call = timed(listed[name].bind(problem))
    checking = time.perf_counter() - began
    if checking > 2 * SECONDS and not listed[name].compiled:
        one = checking  # slow enough to know: 3 rounds
    else:
        one = seconds_of(call, 2)
    calls = max(1, min(2000, int(ROUND / one)))
    rounds = max(3, min(50, int(SECONDS / (one * calls))))
    benchmark.group = f"({size[0]}, {size[1]}) {dtype} on {DEVICE}"
    benchmark.extra_info |= {
        "what": listed[name].what,
        "minimum_traffic_bytes": problem.minimum_traffic,
        "relative_errors": errors,
    }
    benchmark.pedantic(call, rounds=rounds, iterations=calls)
    if benchmark.stats is not None:  # None with --benchmark-disable
        traffic = problem.clone_traffic if name == CLONE else problem.minimum_traffic
        bandwidth = problem.clone_traffic / clone_seconds(size, dtype)
        benchmark.extra_info["share_of_clone"] = traffic / benchmark.stats.stats.median / bandwidth
