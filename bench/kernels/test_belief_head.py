"""Benchmark the belief head at a few sizes (`pytest bench/ --benchmark-only`); `step_report.py` measures all sizes."""

import pytest
import torch

from bench.kernels import head_contenders as head
from bench.lib.benchmarked import DEVICE, measure

HEADS = [size for size in head.SIZES if size[2] <= 1000]
LARGEST = head.SIZES[-1]


@pytest.mark.parametrize("name", [name for name in head.names() if not name.startswith("compiled")])
@pytest.mark.parametrize("prior", head.PRIORS)
@pytest.mark.parametrize("size", HEADS, ids=lambda size: "x".join(map(str, size[:3])))
def test_belief_head(benchmark, size, prior, name):
    measure(benchmark, head, (*size, prior), name)


@pytest.mark.skipif(DEVICE == "cpu", reason=f"{LARGEST}: takes too long on a CPU; step_report.py measures it")
@pytest.mark.parametrize("name", (head.DIRECT, head.COLLAPSED))
def test_belief_head_large(benchmark, name):
    try:
        measure(benchmark, head, (*LARGEST, "given"), name)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"too large for this GPU: {str(error).splitlines()[0]}")
