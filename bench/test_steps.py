"""`pytest bench/ --benchmark-only`: the cascade's training step and the belief head, at few sizes.

Each contender is checked against float64 before it is timed. `step_report.py` measures all of it, interleaved, and
memory and operator calls with it; what takes minutes (all that is compiled, the largest heads) is there only.
"""

import functools

import cascade_contenders as cascade
import head_contenders as head
import pytest
import torch
from benchmarked import DEVICE, checked


def quick(names):
    return [name for name in names if not name.startswith("compiled")]


FEW = (cascade.DIRECT, cascade.TRAINER, cascade.REFERENCE, cascade.BP_FUSED)  # at the size that takes longest
HEADS = [size for size in head.SIZES if size[2] <= 1000]
LARGEST = head.SIZES[-1]


@functools.lru_cache(maxsize=1)
def case(module, size):
    problem = module.make_problem(size, DEVICE)
    return problem, module.truth(problem), *module.contenders(DEVICE, problem)


def measure(benchmark, module, size, name):
    problem, expected, listed, left_out = case(module, size)
    if name not in listed:
        pytest.skip(left_out.get(name, "not on this machine"))
    contender = listed[name]
    run = contender.run(problem)
    group, check = f"{module.label(size)}, on {DEVICE}", functools.partial(module.check, contender, run)
    errors = checked(benchmark, group, contender, run.step, lambda: check(problem, expected))
    benchmark.extra_info |= {"what": contender.what, "relative_errors": errors}


@pytest.mark.parametrize("name", quick(cascade.names()))
@pytest.mark.parametrize("size", cascade.SIZES, ids=lambda size: f"C={size[4]}")
def test_cascade_step(benchmark, size, name):
    if size == cascade.SIZES[-1] and name not in FEW and DEVICE == "cpu":
        pytest.skip("to be quick; step_report.py has all")
    measure(benchmark, cascade, size, name)


@pytest.mark.parametrize("name", quick(head.names()))
@pytest.mark.parametrize("prior", head.PRIORS)
@pytest.mark.parametrize("size", HEADS, ids=lambda size: "x".join(map(str, size[:3])))
def test_belief_head(benchmark, size, prior, name):
    measure(benchmark, head, (*size, prior), name)


@pytest.mark.skipif(DEVICE == "cpu", reason=f"{LARGEST}: takes too long on a CPU; step_report.py has it")
@pytest.mark.parametrize("name", (head.DIRECT, head.COLLAPSED))
def test_belief_head_large(benchmark, name):
    try:
        measure(benchmark, head, (*LARGEST, "given"), name)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"too large for this GPU: {str(error).splitlines()[0]}")
