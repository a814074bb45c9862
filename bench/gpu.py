"""What `make gpu` runs on a machine with CUDA: build, GPU tests, compute-sanitizer, benchmarks; one JSON in the end.

    python bench/gpu.py [--out bench/results/gpu-NAME.json]

It needs no network: it builds with the Python it is run by, against the torch that is there. Every step has a time
limit, and all of them together end within nine minutes: a step for which no time is left is skipped, and named. The
JSON is written after every step. Exit status: 0 no step failed, 1 one did, 2 this machine has no CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import record

TOTAL = 530.0  # seconds for all steps together; nine minutes are 540
TAIL = 10_000  # characters of a step's output that are kept
SANITIZER_EXIT = 9  # what compute-sanitizer exits with after a report


@dataclass
class Step:
    """A command, how long it may take, and how its outcome is read."""

    name: str
    command: Callable[[float], list[str]]  # of the time limit it is run under
    limit: float  # seconds it may take
    least: float  # seconds without which it is not worth starting; kept free for it by the steps before
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[dict, str], dict] = lambda outcome, output: {}  # what to add to (or change in) its outcome
    needed: bool = False  # the steps after it are skipped where it fails
    missing: str | None = None  # why it cannot be run here


def run_step(step: Step, limit: float) -> dict:
    """Run the command and everything it starts, for `limit` seconds at most."""
    command, began = step.command(limit), time.monotonic()
    outcome = {"name": step.name, "command": record.command(command), "limit_seconds": round(limit, 1)}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, cwd=record.ROOT, env=os.environ | step.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return outcome | {"status": "failed", "seconds": 0.0, "reason": record.scrub(str(error))}
        try:
            code = process.wait(timeout=limit)
            outcome |= {"status": "passed" if code == 0 else "failed", "exit_status": code}
            if code:
                outcome["reason"] = f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome |= {"status": "failed", "reason": f"stopped at its limit of {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started and left running, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcome["seconds"] = round(time.monotonic() - began, 1)
        output.seek(0)
        text = output.read()
    try:
        outcome |= step.read(outcome, text)
    except Exception as error:
        outcome |= {"status": "failed", "reason": f"its output was not understood: {error!r}"}
    outcome["output_tail"] = record.scrub(text[-TAIL:]).splitlines()
    return outcome


def run_steps(steps: list[Step], total: float, done: Callable[[list[dict]], None]) -> list[dict]:
    """Each step in turn, none beyond `total` seconds; `done` gets the outcomes so far after every one."""
    began, outcomes, broken = time.monotonic(), [], None
    for i, step in enumerate(steps):
        left = total - (time.monotonic() - began)
        limit = min(step.limit, left - sum(later.least for later in steps[i + 1 :] if not later.missing))
        reason = step.missing or (broken and f"{broken} failed")
        if reason is None and limit < step.least:
            limit = min(step.least, left)  # what was kept free for it, up to what starting and ending the others took
            if limit < 0.8 * step.least:
                reason = f"no time left: {max(left, 0):.0f} s, and it takes {step.least:.0f} s at least"
        print(f"{step.name} ...", flush=True)
        if reason is not None:
            outcome = {"name": step.name, "status": "skipped", "reason": reason, "seconds": 0.0}
        else:
            outcome = run_step(step, limit)
        if outcome["status"] == "failed":
            print("\n".join(f"    {line}" for line in outcome.get("output_tail", [])[-30:]))
            broken = broken or (step.name if step.needed else None)
        print(f"    {outcome['status']} in {outcome['seconds']:.0f} s {outcome.get('reason', '')}", flush=True)
        outcomes.append(outcome)
        done(outcomes)
    return outcomes


# ---------------------------------------------------------------- reading what the steps leave


def read_backends(outcome: dict, output: str) -> dict:
    states = dict(re.findall(r"^backend (\w+)\s+(.*)$", output, re.M))
    found = {"backends": {name: record.scrub(state) for name, state in states.items()}}
    if outcome["status"] == "passed" and not states.get("cuda", "").startswith("usable"):
        found |= {"status": "failed", "reason": f"backend cuda is {record.scrub(states.get('cuda', 'not listed'))}"}
    return found


def read_junit(path: Path, outcome: dict) -> dict:
    if not path.exists() or not path.stat().st_size:
        return {}
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    found = {"tests": counts, "failed_tests": failed}
    if outcome["status"] == "passed" and not counts["passed"]:
        found |= {"status": "failed", "reason": "no GPU test was run"}
    elif failed:
        found["reason"] = f"{len(failed)} of {len(cases)} tests failed"
    return found


def read_sanitizer(outcome: dict, output: str) -> dict:
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ", output)
    if re.search(r"Device not supported|device is not supported", output):
        return {"status": "skipped", "reason": "compute-sanitizer does not support this device", "verdict": "not run"}
    if not summaries:
        reason = outcome.get("reason", "compute-sanitizer printed no summary")
        return {"status": "failed", "reason": reason, "verdict": "not finished"}
    reports = sum(map(int, summaries))
    if reports:
        return {"status": "failed", "reason": f"{reports} reports", "verdict": f"{reports} reports"}
    return {"verdict": "clean"}


def read_json(path: Path, outcome: dict) -> dict:
    """A benchmark's own file; it is written after every size, so it is there even where time ran out."""
    return {"result": json.loads(path.read_text())} if path.exists() else {}


# ---------------------------------------------------------------- the steps


def find(program: str) -> str | None:
    """Where a program of the CUDA toolkit is, as setup.py looks for nvcc."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside = [f"{home}/bin/{program}" for home in (*homes, "/usr/local/cuda")]
    places = [os.environ.get("CUDACXX") if program == "nvcc" else None, shutil.which(program), *beside]
    return next((place for place in places if place and Path(place).exists()), None)


def what_is_missing() -> list[str]:
    missing = []
    try:
        import torch

        if not torch.cuda.is_available():
            missing.append("a GPU that PyTorch sees")
    except ImportError:
        missing.append(f"PyTorch for {Path(sys.executable).name}")
    if find("nvcc") is None:
        missing.append("nvcc")
    return missing


def make_steps(scratch: Path, capability: str) -> list[Step]:
    """capability: "90" for 9.0. The build is for this GPU alone: that takes a fraction of the time."""
    python, sanitizer = sys.executable, find("compute-sanitizer")
    programs = {"PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # cmake, ninja
    architectures = os.environ.get("SID_KERNELS_CUDA_ARCHS", f"{capability}-real")
    case = [python, "bench/sanitizer_case.py"]
    no_sanitizer = None if sanitizer else "compute-sanitizer is not installed"
    tests, benchmark, training = scratch / "tests.xml", scratch / "benchmark.json", scratch / "steps.json"

    def sanitize(tool: str, **environment) -> Step:
        words = [sanitizer or "compute-sanitizer", "--tool", tool, "--target-processes", "all"]
        words += ["--error-exitcode", str(SANITIZER_EXIT), *case]
        return Step(tool, lambda limit: words, 70, 30, programs | environment, read_sanitizer, missing=no_sanitizer)

    return [
        Step("build", lambda limit: [python, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"],
             240, 60, programs | {"SID_KERNELS_CUDA": "on", "SID_KERNELS_CUDA_ARCHS": architectures}, needed=True),
        Step("backends", lambda limit: [python, "-m", "sid_kernels.info"],
             60, 15, programs, read_backends, needed=True),
        Step("tests", lambda limit: [python, "-m", "pytest", "-m", "gpu", "tests", "-q", f"--junitxml={tests}"],
             180, 60, programs, lambda outcome, output: read_junit(tests, outcome)),
        # Each tensor an allocation of its own, so that an access beyond its end is one.
        sanitize("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitize("racecheck"),
        Step("benchmark", lambda limit: [python, "bench/report.py", "--device", "cuda", f"--out={benchmark}",
                                         f"--budget={max(limit - 45, 20):.0f}"],  # 45 s: for the size begun last
             200, 100, programs, lambda outcome, output: read_json(benchmark, outcome)),
        Step("steps", lambda limit: [python, "bench/step_report.py", "--device", "cuda", f"--out={training}",
                                     "--seconds=2", f"--budget={max(limit - 45, 20):.0f}"],
             200, 90, programs, lambda outcome, output: read_json(training, outcome)),
    ]  # fmt: skip


def summary(outcomes: list[dict]) -> str:
    lines = [f"{'step':12s}{'outcome':10s}{'seconds':>8s}  "]
    for outcome in outcomes:
        notes = [outcome["verdict"]] if "verdict" in outcome else []
        if "tests" in outcome:
            notes.append(", ".join(f"{count} {kind}" for kind, count in outcome["tests"].items()))
        if "result" in outcome:
            unmeasured = outcome["result"]["not_measured"]
            notes.append(f"{len(outcome['result']['results'])} tables, {len(unmeasured)} cases not measured")
        notes += [outcome["reason"]] if outcome.get("reason") not in (None, *notes) else []
        lines.append(f"{outcome['name']:12s}{outcome['status']:10s}{outcome['seconds']:8.0f}  {'; '.join(notes)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write (default: bench/results/gpu-NAME.json)")
    parser.add_argument(
        "--total", type=float, default=TOTAL, help="seconds for all steps together (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits, and run none")
    args = parser.parse_args(argv)
    if args.dry_run:
        for step in make_steps(Path("."), "90"):
            words = record.command(step.command(step.limit))
            print(f"{step.name:10s} {step.limit:4.0f} s at most, {step.least:3.0f} s kept free  {words}")
        return 0
    if missing := what_is_missing():
        print(f"gpu: this machine has no CUDA to run on; missing: {', '.join(missing)}", file=sys.stderr)
        return 2

    import torch

    began = time.monotonic()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    out = args.out or record.ROOT / "bench" / "results" / f"gpu-{name}.json"
    filed = record.header("build, GPU tests, compute-sanitizer and benchmarks on one machine")
    filed |= {"seconds": None, "steps": []}

    def save(outcomes: list[dict]) -> None:
        filed.update(steps=outcomes, seconds=round(time.monotonic() - began, 1))
        record.write_json(out, filed)

    with tempfile.TemporaryDirectory() as scratch:
        steps = make_steps(Path(scratch), "".join(map(str, torch.cuda.get_device_capability(0))))
        outcomes = run_steps(steps, args.total - (time.monotonic() - began), save)
    for outcome in outcomes:
        if "result" in outcome:
            print("\n" + "\n".join(outcome["output_tail"]))
    print(f"\n{summary(outcomes)}\n\n{filed['seconds']:.0f} s in all; written: {out}")
    return 1 if any(outcome["status"] == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
