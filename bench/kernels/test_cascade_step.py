"""Benchmark the training step of a cascade (`pytest bench/ --benchmark-only`); `step_report.py` measures it fully."""

import pytest

from bench.kernels import cascade_contenders as cascade
from bench.lib.benchmarked import DEVICE, measure

FEW = (cascade.DIRECT, cascade.TRAINER, cascade.REFERENCE, cascade.BP_FUSED)  # on a CPU, at the largest size


@pytest.mark.parametrize("name", [name for name in cascade.names() if not name.startswith("compiled")])
@pytest.mark.parametrize("size", cascade.SIZES, ids=lambda size: f"C={size[4]}")
def test_cascade_step(benchmark, size, name):
    if size == cascade.SIZES[-1] and name not in FEW and DEVICE == "cpu":
        pytest.skip("takes too long on a CPU; step_report.py measures it")
    measure(benchmark, cascade, size, name)
