"""Run a kernel report: parse its options, check every contender before it is timed, and measure case after case.

A case is a label and a function that measures it. The JSON is rewritten after every case, so that a run that ends early
keeps what it measured. Exit status: 0 success, 1 one of our own contenders failed its check, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from bench.lib import record


class Parser(argparse.ArgumentParser):
    """Parse the options that every report has. A bad argument ends the program with one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--out", type=Path, required=True, help="the JSON file to write (with --plot: the picture)")
        add("--plot", type=Path, nargs="+", metavar="JSON", help="measure nothing, draw the results in these files")
        add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is a GPU)")
        add("--rounds", type=int, default=50, help="most rounds per size (default: 50; at least 3 are made)")
        add("--seconds", type=float, help="time for the rounds of one size (default: 40 on a CPU, 4 on a GPU)")
        add("--budget", type=float, default=float("inf"), help="after this many seconds no further size is started")
        add("--skip", nargs="+", default=[], metavar="PART", help="leave out contenders with a PART in their names")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse and check the arguments, and fill in the defaults of `device` and `seconds`."""
        args = self.parse_args(argv)
        if args.rounds < 1:
            self.error(f"--rounds is {args.rounds}; it must be at least 1")
        for path in args.plot or ():
            self._check_file(path)
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: PyTorch sees no CUDA GPU")
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.seconds = args.seconds or (40.0 if args.device == "cpu" else 4.0)
        return args

    def _check_file(self, path: Path) -> None:
        try:
            filed = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            self.error(f"--plot: {path} cannot be read: {error.__class__.__name__}")
        if not isinstance(filed, dict) or not (filed.get("results") or filed.get("steps")):
            self.error(f"--plot: {path} holds no results")


def screen(
    listed: dict, left_out: dict[str, str], skip: Collection[str], check: Callable
) -> tuple[dict[str, dict], dict[str, str]]:
    """Check every contender in `listed`, and move those that are skipped or fail from there to `left_out`.

    Returns the errors of those that passed, and the reasons why contenders of ours failed, both by name.
    """
    errors, failed = {}, {}
    for name, contender in list(listed.items()):
        if any(part in name for part in skip):
            left_out[name] = "skipped by --skip"
            del listed[name]
            continue
        try:
            errors[name] = check(contender)
        except Exception as error:
            left_out[name] = reason(error)
            if contender.ours and not isinstance(error, torch.OutOfMemoryError):
                failed[name] = reason(error)
            del listed[name]
    return errors, failed


def reason(error: Exception) -> str:
    """Return the type and the first line of an error, at most 200 characters, for a record."""
    lines = str(error).strip().splitlines()
    return record.scrub(f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]


def run(
    description: str,
    settings: dict,
    args: argparse.Namespace,
    cases: list[tuple[str, Callable[[], tuple[list[dict], dict[str, str]]]]],
    table: Callable[[dict, str], str],
    summary: Callable[[list[dict]], str],
) -> int:
    """Measure all cases, print a table for each, write `args.out` after each, and return the exit status.

    The function of a case returns its entries, which have the keys `left_out` and `failed`, and a description of each
    contender by name.
    """
    result = record.header(description) | {
        "settings": {
            "device": args.device,
            **settings,
            "rounds": args.rounds,
            "seconds_a_size": args.seconds,
            "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUN"))},
        },
        "contenders": {},
        "results": [],
        "not_measured": {},
    }
    began, printed = time.monotonic(), {}
    for label, measure in cases:
        if time.monotonic() - began > args.budget:
            result["not_measured"][label] = "no time left"
        else:
            try:
                entries, descriptions = measure()
            except torch.OutOfMemoryError as error:
                result["not_measured"][label] = reason(error)
            else:
                for entry in entries:
                    print(table(entry, args.device) + "\n", flush=True)
                    reasons = {name: why for name, why in entry["left_out"].items() if printed.get(name) != why}
                    for name, why in reasons.items():
                        print(f"  left out: {name}: {why}")
                    printed |= reasons
                result["results"] += entries
                result["contenders"] |= descriptions
        if label in result["not_measured"]:
            print(f"{label}: not measured: {result['not_measured'][label]}\n", flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        record.write_json(args.out, result)
    print(summary(result["results"]) + f"\n\nwritten: {args.out}")
    failed = {name: why for entry in result["results"] for name, why in entry["failed"].items()}
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}")
    return 1 if failed else 0
