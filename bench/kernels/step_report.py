"""Measure a cascade's training step and the belief head against their alternatives: time, memory and operator calls.

    python bench/kernels/step_report.py --out bench/results/steps-cpu.json
    python bench/kernels/step_report.py --plot bench/results/steps-cpu.json --out docs/images/steps.png

All contenders of a case run in one process; every round measures each of them once. Each is first checked against
float64 on the inputs it is timed on. Peak memory is the most that is allocated at once during a call besides its inputs
(for a step: features, parameters and the states of optimizers). The column after it also excludes the results
(gradients). On a CPU the table shows ratios only; the file also holds the times.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch

from bench.kernels import cascade_contenders as cascade
from bench.kernels import head_contenders as head
from bench.kernels.contenders import ALPHA, DTYPES
from bench.lib import footprint, runner
from bench.lib.timing import Timer, interleave, quartiles, ratios
from sid_kernels.cascade import cpu as cascade_cpu

# The contenders by whose times the others are divided. The summary compares with the first of each pair.
BASES = {"cascade": (cascade.TRAINER, cascade.DIRECT), "head": (head.DIRECT, head.FUSED)}
COSTS = ("peak_bytes", "peak_bytes_beyond_results", "calls")
OPERATIONS = {"cascade": cascade, "head": head}


def measure(operation: str, size, label: str, args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """Measure one case; return a list with its entry, and a description of each contender by name."""
    module = OPERATIONS[operation]
    device = args.device
    problem = module.make_problem(size, device)
    expected = module.truth(problem)
    listed, left_out = module.contenders(device, problem)
    runs, timers = {}, {}

    def check(contender) -> dict[str, float]:
        runs[contender.name] = contender.run(problem)
        return module.check(contender, runs[contender.name], problem, expected)

    errors, failed = runner.screen(listed, left_out, args.skip, check)
    for name in listed:
        try:
            timers[name] = Timer([runs[name].step], device)
        except Exception as error:
            left_out[name] = runner.reason(error)
    times = interleave(timers, args.rounds, args.seconds)
    rows, uncounted = {}, {}
    for name, values in times.items():
        try:
            counted = costs(listed[name], runs[name], device)
        except Exception as error:  # if the profiler does not work here, the times are still filed
            counted, uncounted[name] = dict.fromkeys(COSTS), runner.reason(error)
        low, median, high = quartiles(values)
        rows[name] = {
            "seconds": median,
            "quartiles": [low, high],
            "calls_a_round": timers[name].calls,
            "errors": errors[name],
            **counted,
        }
    entry = {
        "operation": operation,
        "case": label,
        "size": list(size),
        "rounds": min(map(len, times.values()), default=0),
        "contenders": rows,
        "ratios": {name: ratios(times, name) for name in BASES[operation] if name in times},
        "left_out": left_out,
        "not_counted": uncounted,
        "failed": failed,
    }
    return [entry], {contender.name: contender.description for contender in listed.values()}


def costs(contender, run, device: str) -> dict[str, int | None]:
    """Measure the peak memory and the calls of one step, with the keys COSTS; None for what cannot be counted.

    Call it after the times were measured: a profiler may slow down later calls on a GPU.
    """
    peak = None
    if not contender.replayed:
        run.clear()
        cascade_cpu.release()  # frees the cached work memory, so that the step allocates it again and it is counted
        peak = run.kept + footprint.allocated_peak(run.step, device, warm=False)
    if device == "cuda":
        calls = footprint.launches(run.step)
    else:
        calls = None if contender.compiled else footprint.operators(run.step)
    beyond = None if peak is None else max(0, peak - run.returned)
    return dict(zip(COSTS, (peak, beyond, calls), strict=True))


def table(entry: dict, device: str) -> str:
    """Return an entry as a table: times relative to ours, memory, and operator calls (on a GPU: launches and us)."""
    bases, gpu = BASES[entry["operation"]], device == "cuda"
    head = f"  {'':36s}" + "".join(f"{'x ' + base:>{len(base) + 4}s}" for base in bases)
    head += f"{'peak MB':>10s}{'- results':>11s}{'launches' if gpu else 'operators':>11s}{'us' if gpu else '':>11s}"
    lines = [f"{entry['case']}, {entry['rounds']} rounds", head.rstrip()]
    for name, row in entry["contenders"].items():
        line = f"  {name:36s}"
        for base in bases:
            ratio = 1.0 if name == base else entry["ratios"].get(base, {}).get(name, {}).get("of_medians")
            line += f"{_text(ratio, '.2f'):>{len(base) + 4}s}"
        line += f"{_text(_mb(row['peak_bytes']), '.2f'):>10s}"
        line += f"{_text(_mb(row['peak_bytes_beyond_results']), '.2f'):>11s}{_text(row['calls'], 'd'):>11s}"
        lines.append(line + (f"{row['seconds'] * 1e6:11.1f}" if gpu else ""))
    return "\n".join(lines)


def summary(entries: list[dict]) -> str:
    """Return lines for each case: how many times faster ours is than each other, and how much less memory it takes."""
    lines = []
    for operation, (base, _) in BASES.items():
        own = [entry for entry in entries if entry["operation"] == operation and base in entry["ratios"]]
        if own:
            lines.append(f"Times faster {base} is than each contender (in parentheses: times less peak memory):")
        for entry in own:
            lines.append(f"  {entry['case']}")
            for other, ratio in entry["ratios"][base].items():
                peaks = [entry["contenders"][name]["peak_bytes"] for name in (other, base)]
                less = "-" if None in peaks else f"{peaks[0] / peaks[1]:.2f}"
                lines.append(f"    {other:36s}{ratio['of_medians']:8.2f}  ({less})")
    return "\n".join(lines)


def _mb(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def parse_size(parts: str, text: str) -> tuple[int, ...]:
    """Read "128x64" as (128, 64): numbers separated by x, as many as `parts` has letters."""
    numbers = text.split("x")
    if len(numbers) != len(parts) or not all(x.isdecimal() and int(x) for x in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: a size is written {'x'.join(parts)}")
    return tuple(map(int, numbers))


def parse_head(text: str) -> tuple[int, int, int, str]:
    """Read the size of a belief head, as in "2048x512x1000:bfloat16"; the dtype is float32 if it is not given."""
    size, _, dtype = text.partition(":")
    if (dtype := dtype or "float32") not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: the dtype must be one of {', '.join(DTYPES)}")
    return *parse_size("NHC", size), dtype


def cases(args: argparse.Namespace) -> list[tuple]:
    """Return operation, size and label of each case."""
    heads = args.heads or head.SIZES + (head.GPU_SIZES if args.device == "cuda" else ())
    listed = [("cascade", size, cascade.label(size)) for size in args.cascades or cascade.SIZES]
    listed += [("head", (*size, kind), head.label((*size, kind))) for size in heads for kind in head.PRIORS]
    return [case for case in listed if not args.only or any(part in case[2] for part in args.only)]


def main(argv: list[str] | None = None) -> int:
    parser = runner.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", help="only cases with a PART in their labels, as in: --only cascade")
    # fmt: off
    add("--cascades", nargs="+", type=functools.partial(parse_size, "LBHDC"), metavar="LxBxHxDxC",
        help="stages, batch, hidden size, features and classes (default: those in cascade_contenders.py)")
    add("--heads", nargs="+", type=parse_head, metavar="NxHxC[:DTYPE]",
        help="rows, hidden size and classes (default: those in head_contenders.py, with more on a GPU)")
    # fmt: on
    args = parser.parse(argv)
    if args.plot:
        from bench.kernels import step_plot

        if len(args.plot) > 1:
            parser.error("--plot: this picture is of one file")
        step_plot.draw(args.plot[0], args.out)
        print(f"written: {args.out}")
        return 0
    listed = cases(args)
    if not listed:
        parser.error(f"--only {' '.join(args.only)}: no case's label contains that")
    title = "a cascade's training step and the belief head against their alternatives: time, memory, operator calls"
    torch.manual_seed(0)
    work = [(label, functools.partial(measure, operation, size, label, args)) for operation, size, label in listed]
    return runner.run(title, {"alpha": ALPHA}, args, work, table, summary)


if __name__ == "__main__":
    raise SystemExit(main())
