"""Code run in a new interpreter."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parents[1]


def fresh_process(code, timeout=120, **environment):
    """Run code in a new interpreter that can import the test helpers; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=TESTS, timeout=timeout, capture_output=True, text=True,
        env=os.environ | {"SID_KERNELS_CPU": "avx512"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()
