"""Share seeds, the markers `gpu` and `exhaustive`, and the backends that can run here among all test files.

A test that takes the fixture `backend` runs on each of them: reference and cpu on the CPU, and with a GPU also
reference, cuda and triton there. The report's header says which, and why the others are not.
"""

import os

import pytest
import torch

from helpers.backends import Backend
from sid_kernels.core import backends

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a GPU machine without a network has no hypothesis; files that need it skip themselves
    pass
else:
    settings.register_profile(
        "sid", deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("sid")


ON_CPU = [Backend("reference", "cpu"), Backend("cpu", "cpu")]
ON_GPU = [Backend("reference", "cuda"), Backend("cuda", "cuda"), Backend("triton", "cuda")]


def _param(backend: Backend):
    reason = backends.unavailable(backend.name)
    marks = [pytest.mark.skip(reason=f"backend {backend.name}: {reason}")] if reason else []
    if backend.device == "cuda":
        marks.append(pytest.mark.gpu)
    return pytest.param(backend, marks=marks, id=f"{backend.name}-{backend.device}")


BACKENDS = [_param(b) for b in ON_CPU + (ON_GPU if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> Backend:
    return request.param


def _kernels():
    for name in ("cuda", "triton"):
        reason = backends.unavailable(name) if torch.cuda.is_available() else None  # without: the marker gpu skips
        yield pytest.param(name, marks=[pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason else [])


@pytest.fixture(params=_kernels())
def kernel(request) -> str:
    """Return each of the backends made for GPUs, for tests marked gpu."""
    return request.param


@pytest.fixture(autouse=True)
def as_at_the_start():
    """Seed PyTorch before a test, and stop flushing denormals after it, which the `sid` command starts."""
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def allocated():
    """Return a function that measures a call's peak bytes in PyTorch's CPU allocator, beyond those at its start."""
    from bench.lib.footprint import allocated_peak

    return allocated_peak


def pytest_report_header():
    lines = []
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        lines.append(f"backend {name}: {'usable' if reason is None else f'not usable: {reason}'}")
    return lines


# Folders whose cases are expensive: `make test-quick` leaves them out.
COST = {"tests/compiled/": "aot", "tests/packaging/": "aot", "tests/trainer/distributed/": "processes"}


def pytest_itemcollected(item):
    for folder, mark in COST.items():
        if folder in item.nodeid:
            item.add_marker(mark)


@pytest.hookimpl(trylast=True)  # after pytest's own order, by parameters
def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU: PyTorch sees none here")
    not_asked = pytest.mark.skip(reason="takes hours: set SID_TEST_EXHAUSTIVE=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("exhaustive") and os.environ.get("SID_TEST_EXHAUSTIVE") != "1":
            item.add_marker(not_asked)
    items.sort(key=_turn)


def _turn(item) -> int:
    """Order the tests on a GPU: first what only a GPU can show, last the definition, because time may run out."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if not isinstance(backend, Backend) or backend.device == "cpu":
        return 0
    return 2 if backend.name == "reference" else 1
