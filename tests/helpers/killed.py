"""Run the `sid` command in processes that end themselves at a chosen place, and read what runs leave behind.

The processes are forked from a server which has imported everything and run nothing: a fresh interpreter each would
spend ten times as long on importing as on training.
"""

import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import torch

from helpers.processes import PATIENCE
from sid_trainer.training.checkpoint import LAST, load_checkpoint

TIMES = {
    "images_per_second",
    "tokens_per_second",
    "seconds",
    "elapsed",
    "peak_memory_bytes",
}  # what differs between two runs of equal bits
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "sid_trainer.runs.build",
        "sid_trainer.distributed.strategy",
        "sid_trainer.report.page",
        "sklearn.datasets",
        "sklearn.model_selection",
        "matplotlib.pyplot",
    ]
    + [
        "torch.utils.tensorboard",
        "torch.distributed.tensor",
        "torch._dynamo",  # the first optimizer imports it, in 2 seconds
        "tqdm",
    ]
)


def sid(
    *words: str,
    out: Path,
    kill: tuple[str, int] | None = None,
    number: int = signal.SIGKILL,
    worker: bool = False,
    draw: bool = False,
) -> tuple[int, str]:
    """Run `sid WORDS`; its exit status (-N: ended by signal N) and what it printed, which lies in a file beside `out`.

    kill: the dotted name of a function and n: before its nth call the process sends itself the signal `number`. The
    name "rename" means the rename that puts a new last.pt in its place.
    worker: send the signal to a process that decodes images instead, and wait until it is dead.
    draw: also what follows training, the table and the pictures, which take longer than these runs.
    """
    printed = out.with_name(out.name + ".printed")
    process = _context.Process(target=_run, args=(list(map(str, words)), printed, kill, number, worker, draw))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None, f"sid {words} does not end: {printed.read_text()}"
    return process.exitcode, printed.read_text()


def _run(words, printed, kill, number, worker=False, draw=False):
    descriptor = os.open(printed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # worker processes are children of this one, as of a command
    from sid_trainer import cli

    if not draw:
        from sid_trainer.report import page

        cli.print_end = lambda folder: None
        page.draw_report = lambda results: b"\x89PNG"
    if kill:
        name, nth = kill
        _call_before(*(("os.replace", LAST) if name == "rename" else (name, None)), nth, number, worker)
    raise SystemExit(cli.main(words))


def _call_before(name, destination, nth, number, worker):
    *module, attribute = name.split(".")
    try:
        place = importlib.import_module(".".join(module))
    except ImportError:  # a method: the class is the second to last part of the name
        place = getattr(importlib.import_module(".".join(module[:-1])), module[-1])
    whole, calls = getattr(place, attribute), 0

    def counted(*args, **options):
        nonlocal calls
        calls += destination is None or Path(args[1]).name == destination
        if calls == nth:
            calls += 1  # once only
            victim = multiprocessing.active_children()[0].pid if worker else os.getpid()
            os.kill(victim, number)
            if worker:
                os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
        return whole(*args, **options)

    setattr(place, attribute, counted)


def rows_of(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without what depends on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def state_of(folder: Path) -> dict:
    """Return the checkpoint of a run without what depends on the machine's speed."""
    state = load_checkpoint(folder)
    rows, activation_bytes = json.loads(state["metrics"])
    state["metrics"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return state | {"activation_bytes": activation_bytes, "sums": {**state["sums"], "seconds": None}}


def assert_same(one, other, place="state"):
    """Check that two values are equal in every bit, at every depth."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    else:
        assert one == other, place
