"""Run the triton_*_cases.py under Triton's interpreter, in new processes: triton reads TRITON_INTERPRET at import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import forked

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",  # tiny tensors
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=1800
    )


# Each file, and the least number of its cases: those of `make test`, and the slow ones.
CASES = {
    "triton_cases.py": (137, 84),
    "triton_belief_cases.py": (27, 48),
    "triton_cascade_cases.py": (60, 0),
    "triton_head_cases.py": (60, 0),
    "triton_step_cases.py": (49, 0),
}
IN_SHORT = ("triton_head_cases.py", "not slow")  # `make test-triton` runs the others
SELECTED = [
    pytest.param(
        file, marker, count, id=f"{file}-{marker}", marks=[] if (file, marker) == IN_SHORT else [pytest.mark.slow]
    )
    for file, counts in CASES.items()
    for marker, count in zip(("not slow", "slow"), counts, strict=True)
    if count
]


@pytest.mark.parametrize(("file", "marker", "count"), SELECTED)
def test_cases_under_the_interpreter(file, marker, count, tmp_path):
    pytest.importorskip("triton")
    command = ["-m", "pytest", str(HERE / file), "-m", marker, "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    done = python(*command, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= count, done.stdout  # all were collected
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("hide", ("triton", "gpu"))
def test_why_it_cannot_be_used(tmp_path, hide):
    """Check that importing never fails, and that the reason names what is missing and what would help."""
    block = "import sys; sys.modules['triton'] = None; " if hide == "triton" else ""
    no_gpu = "import torch; torch.cuda.is_available = lambda: False; "
    code = block + no_gpu + "from sid_kernels.core import triton; print(triton.unavailable())"
    done = forked(code, cwd=tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    if hide == "triton":
        assert "install the triton package" in done.stdout
    elif pytest.importorskip("triton"):
        assert "no GPU" in done.stdout and "TRITON_INTERPRET=1" in done.stdout
