"""Benchmark the local loss (`pytest bench/ --benchmark-only`): every contender at every size, a table for each size.

Each contender is checked against float64 on the inputs it is timed on. Contenders are timed one after the other;
`report.py` is more accurate, because there they take turns. On a GPU a timing ends when the GPU is done.
"""

import functools
import statistics

import pytest
import torch

from bench.kernels.contenders import CLONE, DTYPES, GPU_SIZES, SIZES, check, contenders, make_problem, names, truth
from bench.lib.benchmarked import DEVICE, ROUND, checked, seconds_of, timed


@functools.lru_cache(maxsize=1)  # memory does not hold two of the largest problems
def case(size, dtype):
    problem = make_problem(*size, DTYPES[dtype], DEVICE)
    return problem, truth(problem), *contenders(DEVICE, *size)


@functools.lru_cache(maxsize=1)
def clone_seconds(size, dtype):
    """Return the median seconds of `clone`, measured here because its own benchmark may not have been selected."""
    problem, _, listed, _ = case(size, dtype)
    call = timed(listed[CLONE].bind(problem))
    calls = max(1, min(2000, int(ROUND / seconds_of(call, 2))))
    return statistics.median(seconds_of(call, calls) for _ in range(5))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_local_loss(benchmark, size, dtype, name):
    measure(benchmark, size, dtype, name)


@pytest.mark.skipif(DEVICE == "cpu", reason=f"{GPU_SIZES}: measured only on a GPU")
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
    call = listed[name].bind(problem)
    group = f"({size[0]}, {size[1]}) {dtype} on {DEVICE}"
    errors = checked(benchmark, group, listed[name], call, lambda: check(listed[name], problem, expected))
    benchmark.extra_info |= {
        "what": listed[name].description,
        "minimum_traffic_bytes": problem.minimum_traffic,
        "relative_errors": errors,
    }
    if benchmark.stats is not None:  # None with --benchmark-disable
        traffic = problem.clone_traffic if name == CLONE else problem.minimum_traffic
        bandwidth = problem.clone_traffic / clone_seconds(size, dtype)
        benchmark.extra_info["share_of_clone"] = traffic / benchmark.stats.stats.median / bandwidth
