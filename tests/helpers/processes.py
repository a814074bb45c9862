"""Run code in a new process, and wait for what other processes do.

A test waits for an event, never for a time. PATIENCE only ends a test that hangs.
"""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds


@functools.cache
def _fork_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.fork_server"], cwd=TESTS, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def forked(code: str, *arguments: object, cwd: Path = TESTS, **environment: str) -> subprocess.CompletedProcess:
    """Do what `python -c CODE ARGUMENTS` does, but in a fork of a process that has imported PyTorch and nothing else.

    Importing PyTorch takes most of the time of a new interpreter. What only an interpreter reads when it starts
    (PYTHONPATH, PYTHONWARNINGS, OMP_NUM_THREADS) has the values of the process that runs the tests.
    """
    server = _fork_server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        request = {
            "code": textwrap.dedent(code), "arguments": [str(argument) for argument in arguments], "folder": str(cwd),
            "environment": os.environ | environment, "stdout": str(out), "stderr": str(err),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], PATIENCE)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _fork_server.cache_clear()
            raise AssertionError(f"does not end in {PATIENCE:.0f} seconds: {err.read_text()[-4000:]}")
        return subprocess.CompletedProcess(code, int(server.stdout.readline()), out.read_text(), err.read_text())


def fresh_process(code, **environment):
    """Run code in a new process that can import the test helpers, and return what it printed."""
    done = forked(code, **{"SID_KERNELS_CPU": "avx512"} | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def wait_until(true: Callable[[], object], what: str):
    """Return what `true()` returns as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (actual := true()):
        assert time.monotonic() < end, f"{what} does not come in {PATIENCE:.0f} seconds"
        time.sleep(0.005)
    return actual
