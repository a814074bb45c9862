"""Code run in a new interpreter, and waiting for what other processes do.

A test waits for an event, never for a time. PATIENCE only ends a test that hangs.
"""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds


def fresh_process(code, **environment):
    """Run code in a new interpreter that can import the test helpers; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=TESTS, timeout=PATIENCE, capture_output=True, text=True,
        env=os.environ | {"SID_KERNELS_CPU": "avx512"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def wait_until(true: Callable[[], object], what: str):
    """Return what `true()` returns as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"{what} does not come in {PATIENCE:.0f} seconds"
        time.sleep(0.005)
    return found
