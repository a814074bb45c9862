"""Measure what the memory of large outputs costs: kept, new, and new while the system's memory is fragmented.

    python bench/kernels/large_outputs.py --out bench/results/large-outputs.json
    python bench/kernels/large_outputs.py --out FILE --fragment 14   # also while 14 GiB are fragmented on purpose

Loss, belief and gradient of float32 logits on a CPU. All contenders run in one process; every round measures each once.
To fragment memory, a second process fills it and frees every other page.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch

from bench.kernels.contenders import FUSED, contenders, make_problem
from bench.lib import record
from bench.lib.timing import quartiles
from sid_kernels import release_memory
from sid_kernels.core import memory

KEPT = "ours, memory kept"
COMPILED = "compiled collapsed"
FRAGMENT = """
import mmap, sys
size = int(sys.argv[1])
block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.madvise(mmap.MADV_NOHUGEPAGE)
for start in range(0, size, 4096):
    block[start] = 1
for start in range(0, size, 8192):
    block.madvise(mmap.MADV_DONTNEED, start, 4096)
print("fragmented", flush=True)
sys.stdin.read()
"""


def calls(rows: int, classes: int) -> dict[str, Callable[[], object]]:
    """Return the calls to measure, by name."""
    problem = make_problem(rows, classes, torch.float32, "cpu")
    listed, left_out = contenders("cpu", rows, classes)
    if COMPILED in left_out:
        raise SystemExit(f"{COMPILED}: {left_out[COMPILED]}")
    fused, compiled = listed[FUSED].bind(problem), listed[COMPILED].bind(problem)

    def changed(name: str, value: object) -> Callable[[], object]:
        def call() -> object:
            release_memory()
            with mock.patch.object(memory, name, value):
                return fused()

        return call

    return {
        KEPT: fused,
        "ours, new memory": changed("MOST_IDLE", memory.MOST_IDLE),
        "ours, new memory, pages of 4 KiB": changed("free_in_large_pages", lambda: 0),
        "ours, new memory, always pages of 2 MiB": changed("free_in_large_pages", lambda: 1 << 62),
        "ours, memory of PyTorch": changed("LEAST_BYTES", sys.maxsize),
        COMPILED: compiled,
        "eager four-op": listed["eager four-op"].bind(problem),
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Return the quartiles of the seconds of each call, and how many times faster than the compiled form it is."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            if name == KEPT:
                function()  # the memory of the call before was released
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds[COMPILED])
    return {
        name: {"quartiles": quartiles(values), "compiled_over_this": base / statistics.median(values)}
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--fragment", type=float, default=0.0, metavar="GIB", help="measure again while GIB of memory are fragmented"
    )
    args = parser.parse_args()
    functions = calls(args.rows, args.classes)
    filed = record.header("memory of large outputs") | {"rows": args.rows, "classes": args.classes, "states": {}}

    def measure_state(state: str) -> None:
        machine = record.machine()
        filed["states"][state] = {"memory": machine["memory"], "calls": measure(functions, args.rounds)}
        record.write_json(args.out, filed)
        print(f"{state}, seconds, times faster than {COMPILED}:")
        for name, entry in filed["states"][state]["calls"].items():
            print(f"  {name:42s} {entry['quartiles'][1]:.3f}  {entry['compiled_over_this']:.2f}", flush=True)

    measure_state("as found")
    if args.fragment:
        size = int(args.fragment * 2**30) // mmap.PAGESIZE * mmap.PAGESIZE
        with subprocess.Popen(
            [sys.executable, "-c", FRAGMENT, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin and process.stdout
            if "fragmented" not in process.stdout.readline():
                raise SystemExit(f"--fragment: {args.fragment} GiB cannot be allocated")
            measure_state("fragmented")
            process.stdin.close()


if __name__ == "__main__":
    main()
