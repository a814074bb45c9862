"""Run the `sid` command in several processes that connect, and compare what such runs leave.

The processes are forked as in `killed`, which costs a tenth of a start by torchrun, or started by torchrun, whose ranks
can then be killed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.killed import _context, _run, assert_same, rows_of, sid, state_of
from helpers.processes import PATIENCE
from sid_trainer.runs.build import PROCESSES

STEP = "sid_trainer.training.trainer.Trainer.train_step"
MEMORY = {"activation_bytes", "pipeline"}  # of rows: what differs with the number of processes, besides times
STARTS = {*PROCESSES, "run", "fused", "launch"}  # of config.json


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def environments(count: int, port: int, start: dict[str, str]) -> list[dict[str, str]]:
    """Return the variables that torchrun sets in each of `count` processes; `start`: those of one launch."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | start
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _forked(environment: dict, call: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    call(*arguments)


def start(calls: Sequence[tuple[Callable, tuple]], port: int | None = None, of_start: dict | None = None) -> list:
    """Start processes that make these calls, one each, as ranks 0, 1, ..."""
    places = environments(len(calls), port or free_port(), of_start or {})
    processes = [_context.Process(target=_forked, args=(p, *call)) for p, call in zip(places, calls, strict=True)]
    for process in processes:
        process.start()
    return processes


def start_ranks(
    each: Sequence[Sequence], out: Path, port: int | None = None, ends: dict | None = None, of_start: dict | None = None
) -> list:
    """Start processes of `sid WORDS`, each with its own words; what they print is in `printed(out, rank)`.

    ends: by rank, (the name of a function, n, a signal) as in `killed.sid`.
    """
    calls = []
    for rank, words in enumerate(each):
        *kill, number = (ends or {}).get(rank, (signal.SIGKILL,))
        calls.append((_run, (list(map(str, words)), printed(out, rank), tuple(kill) or None, number)))
    return start(calls, port, of_start)


def restart(of: str, count: int = 1) -> dict[str, str]:
    """Return the variables that the torchrun launch `of` sets after it has restarted its processes `count` times."""
    return {"TORCHELASTIC_RUN_ID": of, "TORCHELASTIC_RESTART_COUNT": str(count)}


def printed(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.{rank}.printed")


def finish(processes: list) -> list[int]:
    """Wait for processes and return their exit statuses; none is left running."""
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    status = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # also one that is stopped
        process.join()
    assert None not in status, f"exit statuses after {PATIENCE:.0f} seconds: {status}"
    return status


def ranks(*words, count: int, out: Path, **options) -> tuple[list[int], list[str]]:
    """Run `sid WORDS` in several processes; return their exit statuses, and what each has printed."""
    status = finish(start_ranks([words] * count, out, **options))
    return status, [printed(out, rank).read_text() for rank in range(count)]


def trained(*words, count: int, out: Path) -> Path:
    """Return the folder of `sid train WORDS` by several processes of one thread each."""
    command = ("train", *words, "--out", out)
    if count == 1:
        status, said = sid(*command, out=out)
        assert status == 0, said
    else:
        status, said = ranks(*command, count=count, out=out)
        assert status == [0] * count and (said[0] == "" or "stage" not in words), said
    return out


# ---------------------------------------------------------------- by torchrun


@contextlib.contextmanager
def torchrun(
    *words, count: int, out: Path, restarts: int = 0, meeting: Sequence[str] = ("--standalone",), stop_at: int = 0
):
    """Run torchrun of `sid WORDS`; `.text()` is what all ranks have printed. What is left at the end is killed.

    stop_at: send torchrun a SIGTERM before this step, counted from 1 (see `rank_main`).
    """
    if "--standalone" not in meeting:
        port = free_port()
        meeting = [*meeting, f"--rdzv-endpoint=localhost:{port}" if meeting else f"--master-port={port}"]
    file = out.with_name(out.name + ".printed")
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={count}"]
    command += [f"--max-restarts={restarts}", "-m", "helpers.rank_main" if stop_at else "sid_trainer", *map(str, words)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SID_STOP_AT": str(stop_at), "PYTHONPATH": ":".join(paths)}
    with open(file, "w") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process:
        run = SimpleNamespace(process=process, text=file.read_text)
        try:
            yield run
        finally:
            left = workers(process.pid)
            process.kill()
            for pid in left.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def workers(torchrun: int) -> dict[int, int]:
    """Return the processes of torchrun's ranks, rank -> process id, as far as they have been started."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it has ended in the meantime
            if int(file.read_text().rpartition(")")[2].split()[1]) == torchrun:
                variables = dict(v.split("=", 1) for v in (file.parent / "environ").read_text().split("\0") if "=" in v)
                if "RANK" in variables:
                    found[int(variables["RANK"])] = int(file.parent.name)
    return found


# ---------------------------------------------------------------- what runs leave


def left(folder: Path) -> dict:
    """Return all numbers of a run's checkpoint and metrics.jsonl except times and memory."""
    state = state_of(folder)
    state.pop("activation_bytes")
    about = {name: value for name, value in state.pop("config").items() if name not in STARTS}
    rows = [
        [{k: v for k, v in row.items() if k not in MEMORY} for row in some]
        for some in (state.pop("metrics"), rows_of(folder))
    ]
    return state | {"network": dict(state["network"]), "about": about, "rows": rows}


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs are equal in every bit, whatever number of processes made them."""
    assert_same(left(one), left(other))


def assert_close_runs(one: Path, other: Path) -> None:
    """Check that one process and many replicas leave the same, up to the order in which images are summed."""
    states = [state_of(folder) for folder in (one, other)]
    for name, tensor in states[0]["network"].items():
        torch.testing.assert_close(
            states[1]["network"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in zip(*(state["optimizers"] for state in states), strict=True):
        for buffers in zip(
            (mine or {"state": {}})["state"].values(), (theirs or {"state": {}})["state"].values(), strict=True
        ):
            torch.testing.assert_close(
                buffers[1]["momentum_buffer"], buffers[0]["momentum_buffer"], rtol=1e-3, atol=1e-4
            )
    for row, there in zip(rows_of(one), rows_of(other), strict=True):
        assert set(row) == set(there) - {"pipeline"}
        for name in ("train_loss", "stage_loss", "stage_kl", "lr", "step"):
            assert there[name] == pytest.approx(row[name], rel=1e-5, abs=1e-7), name
        for name in ("train_accuracy", "test_accuracy", "stage_accuracy", "certificate"):
            assert there[name] == pytest.approx(row[name], abs=0.011), name  # a rounded tie
