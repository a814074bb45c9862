"""Measure the fused local loss against its alternatives and a copy of the same bytes, and write one JSON file.

    python bench/kernels/report.py --out bench/results/cpu.json
    python bench/kernels/report.py --plot bench/results/cpu.json --out docs/images/bench.png
    python bench/kernels/report.py --plot AVX2.json AVX512.json --out PICTURE   # two files in one picture

All contenders run in one process; every round measures each of them once. Each is first checked against float64 on the
inputs it is timed on. "Share of clone" is the bandwidth of the operation, counting only the bytes it must move, divided
by the bandwidth of `clone`. On a CPU the table shows ratios only; the file also holds the times.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch

from bench.kernels.contenders import (
    ALPHA,
    ALTERNATIVES,
    CLONE,
    DIRECT,
    DTYPES,
    FUSED,
    GPU_SIZES,
    SIZES,
    Problem,
    check,
    contenders,
    make_problem,
    truth,
)
from bench.lib import record, runner
from bench.lib.timing import GraphTimer, Timer, interleave, quartiles, ratios
from sid_kernels.core import backends

GRAPH_ELEMENTS = 1 << 22  # up to this many logits a GPU waits for launches, so calls are also replayed from a graph
MOST_SETS = 64
# Measured first, because a run may end early: the sizes for which the project states targets.
FIRST = (((8192, 32000), "bfloat16"), ((65536, 1000), "float32"), ((4096, 1000), "float32"), ((128, 10), "float32"))


def input_sets(problem_bytes: int, cache_bytes: int) -> int:
    """Return how many inputs to use in turn, so that they do not stay in the GPU's last-level cache.

    Small problems do stay in it, as in training, where the logits have just been written.
    """
    sets = -(-4 * cache_bytes // problem_bytes)
    return sets if 1 <= sets <= MOST_SETS else 1


def measure(size: tuple[int, int], dtype: str, device: str, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """Measure one size and dtype; return its entries and a description of each contender by name.

    There is one entry for ordinary calls and, for small sizes on a GPU, one for replayed graphs.
    """
    rows, classes = size
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20) if device == "cuda" else 0
    first = make_problem(rows, classes, DTYPES[dtype], device)
    problems = [first]
    for seed in range(1, input_sets(first.clone_traffic // 2, cache)):
        problems.append(make_problem(rows, classes, DTYPES[dtype], device, seed))
    expected = truth(first)
    listed, left_out = contenders(device, rows, classes)
    errors, failed = runner.screen(listed, left_out, args.skip, lambda contender: check(contender, first, expected))
    entries = []
    for launch in ("calls", "graph") if device == "cuda" and rows * classes <= GRAPH_ELEMENTS else ("calls",):
        timers, skipped = {}, dict(left_out)
        for name, contender in listed.items():
            functions = [contender.bind(problem) for problem in problems]
            if launch == "graph" and contender.waits:
                skipped[name] = "cannot be captured: it waits for the GPU"
                continue
            try:
                timers[name] = Timer(functions, device) if launch == "calls" else GraphTimer(functions)
            except Exception as error:
                skipped[name] = ("cannot be captured: " if launch == "graph" else "") + runner.reason(error)
        times = interleave(timers, args.rounds, args.seconds)
        entries.append(_entry(first, dtype, launch, len(problems), device, timers, times, errors, skipped))
        entries[-1]["failed"] = failed
    return entries, {contender.name: contender.description for contender in listed.values()}


def _entry(problem: Problem, dtype, launch, sets, device, timers, times, errors, skipped) -> dict:
    rows, classes = problem.logits.shape
    contender_rows = {}
    clone_median = quartiles(times[CLONE])[1]
    clone_bandwidth = problem.clone_traffic / clone_median
    for name, values in times.items():
        low, median, high = quartiles(values)
        traffic = problem.clone_traffic if name == CLONE else problem.minimum_traffic
        contender_rows[name] = {
            "seconds": median,
            "quartiles": [low, high],
            "calls_a_round": timers[name].calls,
            "share_of_clone": traffic / median / clone_bandwidth,
            "errors": errors[name],
        }
    return {
        "rows": rows,
        "classes": classes,
        "dtype": dtype,
        "launch": launch,
        "auto": backends.automatic(device, rows * classes),
        "input_sets": sets,
        "rounds": len(times[CLONE]),
        "minimum_traffic_bytes": problem.minimum_traffic,
        "clone_traffic_bytes": problem.clone_traffic,
        "contenders": contender_rows,
        "ratios": {name: ratios(times, name) for name in (FUSED, DIRECT) if name in times},
        "left_out": {name: record.scrub(reason) for name, reason in skipped.items()},
    }


def table(entry: dict, device: str) -> str:
    """Return an entry as a table: times relative to ours and share of clone; on a GPU also microseconds and GB/s."""
    launch = "replayed from a graph" if entry["launch"] == "graph" else "ordinary calls"
    title = f"({entry['rows']}, {entry['classes']}) {entry['dtype']}, {launch}, {entry['rounds']} rounds"
    gpu = device == "cuda"
    head = f"  {'':32s}{'x fused_local_loss':>20s}{'x local_loss_and_grad':>23s}{'share of clone':>16s}"
    lines = [title, head + (f"{'us':>12s}{'GB/s':>9s}" if gpu else "")]
    for name, row in entry["contenders"].items():
        line = f"  {name:32s}"
        for base, width in ((FUSED, 20), (DIRECT, 23)):
            ratio = 1.0 if name == base else entry["ratios"].get(base, {}).get(name, {}).get("of_medians")
            line += f"{'-' if ratio is None else format(ratio, '.2f'):>{width}s}"
        line += f"{row['share_of_clone']:16.1%}"
        if gpu:
            moved = entry["clone_traffic_bytes" if name == CLONE else "minimum_traffic_bytes"]
            line += f"{row['seconds'] * 1e6:12.1f}{moved / row['seconds'] / 1e9:9.0f}"
        lines.append(line)
    return "\n".join(lines)


def summary(entries: list[dict]) -> str:
    """Return lines for each size: how many times faster ours is than each alternative, and its share of clone."""
    title = f"{'times faster than':24s}" + "".join(f"{name:>20s}" for name in ALTERNATIVES) + f"{'share of clone':>17s}"
    lines = [title]
    for entry in entries:
        size = f"({entry['rows']}, {entry['classes']}) {entry['dtype']} {entry['launch']}"
        lines.append(size)
        for name in (FUSED, DIRECT):
            if name not in entry["ratios"]:
                continue
            line = f"  {name:22s}"
            for other in ALTERNATIVES:
                ratio = entry["ratios"][name].get(other)
                line += f"{'-' if ratio is None else format(ratio['of_medians'], '.2f'):>20s}"
            lines.append(line + f"{entry['contenders'][name]['share_of_clone']:17.1%}")
    return "\n".join(lines)


def plan(args: argparse.Namespace) -> list[tuple[tuple[int, int], str]]:
    """Return the sizes and dtypes to measure, in order."""
    sizes = args.sizes or (SIZES + GPU_SIZES if args.device == "cuda" else SIZES)
    wanted = [(size, dtype) for size in sizes for dtype in args.dtypes]
    return [x for x in FIRST if x in wanted] + [x for x in wanted if x not in FIRST]


def parse_size(text: str) -> tuple[int, int]:
    """Read "4096x1000" as (4096, 1000)."""
    rows, _, classes = text.partition("x")
    if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
        raise argparse.ArgumentTypeError(f"{text!r}: a size is written ROWSxCLASSES, as in 4096x1000")
    return int(rows), int(classes)


def main(argv: list[str] | None = None) -> int:
    parser = runner.Parser(__doc__)
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", metavar="ROWSxCLASSES", help="(default: all in contenders.py)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    args = parser.parse(argv)
    if args.plot:
        from bench.kernels import report_plot

        report_plot.draw(args.plot, args.out)
        print(f"written: {args.out}")
        return 0
    description = "the fused local loss (loss, belief, gradient of the logits) against its alternatives and a clone"
    cases = [
        (f"{size[0]}x{size[1]} {dtype}", functools.partial(measure, size, dtype, args.device, args))
        for size, dtype in plan(args)
    ]
    return runner.run(description, {"alpha": ALPHA}, args, cases, table, summary)


if __name__ == "__main__":
    raise SystemExit(main())
