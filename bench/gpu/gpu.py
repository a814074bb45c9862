"""Build, test, sanitize and benchmark on a machine with CUDA (`make gpu`), and write one JSON file.

    python bench/gpu/gpu.py [--out bench/results/gpu-NAME.json]

It needs no network: it builds with the Python that runs it, against the installed torch. Every step has a time limit,
and all steps together end within `--total` seconds: a step without enough time left is skipped and reported. The JSON
file is written after every step; each test's outcome is appended to gpu-NAME.tests.jsonl beside it. compute-sanitizer
runs at the same time as the tests; benchmarks run alone. Exit status: 0 no step failed, 1 a step failed, 2 this machine
has no CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.lib import record

TOTAL = 400.0  # seconds for all steps together
WORKERS = 12  # most test processes at a time; fewer if there are fewer cores, one without pytest-xdist
TAIL = 10_000  # characters of a step's output that are kept
SANITIZER_EXIT = 9  # exit status of compute-sanitizer if it entries an error


@dataclass
class Step:
    """A command, its time limit, and the function that reads its outcome."""

    name: str
    command: Callable[[float], list[str]]  # function of the step's time limit in seconds
    limit: float  # most seconds that it may take
    least: float  # fewest seconds with which it is started; earlier steps leave it that much time
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[dict, str], dict] = lambda outcome, output: {}  # entries to add to its outcome or replace
    needed: bool = False  # if it fails, the steps after it are skipped
    missing: str | None = None  # why it cannot run on this machine
    beside: bool = False  # it runs at the same time as the step before it


def run_step(step: Step, limit: float) -> dict:
    """Run a step for at most `limit` seconds, then kill its command and all processes that it started."""
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
            with contextlib.suppress(ProcessLookupError):  # the group includes processes that the command left running
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
    """Run the steps within `total` seconds and return their outcomes.

    done: called with all outcomes so far after every step, or after the steps that run at the same time.
    """
    began, outcomes, broken = time.monotonic(), [], None
    groups: list[list[Step]] = []
    for step in steps:
        groups[-1].append(step) if step.beside and groups else groups.append([step])
    kept = [max((step.least for step in group if not step.missing), default=0.0) for group in groups]
    for i, group in enumerate(groups):
        left = total - (time.monotonic() - began)
        free = left - sum(kept[i + 1 :])

        def attempt(step: Step, left=left, free=free, broken=broken) -> dict:
            limit, reason = min(step.limit, free), step.missing or (broken and f"{broken} failed")
            if reason is None and limit < step.least:
                limit = min(step.least, left)  # `least` minus the time to start and end earlier steps
                if limit < 0.8 * step.least:
                    reason = f"no time left: {max(left, 0):.0f} s, and it takes {step.least:.0f} s at least"
            if reason is not None:
                return {"name": step.name, "status": "skipped", "reason": reason, "seconds": 0.0}
            return run_step(step, limit)

        print(f"{', '.join(step.name for step in group)} ...", flush=True)
        with ThreadPoolExecutor(len(group)) as pool:
            group_outcomes = list(pool.map(attempt, group))
        for step, outcome in zip(group, group_outcomes, strict=True):
            if outcome["status"] == "failed":
                print("\n".join(f"    {line}" for line in outcome.get("output_tail", [])[-30:]))
                print("".join(f"    {name}: {why}\n" for name, why in outcome.get("failed_tests", {}).items()), end="")
                broken = broken or (step.name if step.needed else None)
            print(f"    {outcome['status']} in {outcome['seconds']:.0f} s {outcome.get('reason', '')}", flush=True)
        outcomes += group_outcomes
        done(outcomes)
    return outcomes


# ---------------------------------------------------------------- reading the outcomes of steps


def read_backends(outcome: dict, output: str) -> dict:
    """Return the state of each backend; the step fails if the CUDA backend is not usable."""
    states = dict(re.findall(r"^backend (\w+)\s+(.*)$", output, re.M))
    entries = {"backends": {name: record.scrub(state) for name, state in states.items()}}
    if outcome["status"] == "passed" and not states.get("cuda", "").startswith("usable"):
        entries |= {"status": "failed", "reason": f"backend cuda is {record.scrub(states.get('cuda', 'not listed'))}"}
    return entries


def read_outcomes(path: Path, outcome: dict) -> dict:
    """Return the counts of test outcomes and the failed tests, from the file that outcome_lines.py wrote.

    The file holds every test that has ended, also if the step was stopped.
    """
    if not path.exists():
        return {}
    by_test = {}
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # an incomplete last line
            line = json.loads(text)
            if by_test.get(line["test"], {}).get("outcome") != "failed":  # a test may fail in two of its phases
                by_test[line["test"]] = line
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for line in by_test.values():
        counts[line["outcome"]] += 1
    failed = {name: line["why"] for name, line in by_test.items() if line["outcome"] == "failed"}
    entries = {"tests": counts, "failed_tests": failed}
    if outcome["status"] == "passed" and not counts["passed"]:
        entries |= {"status": "failed", "reason": "no GPU test was run"}
    elif failed:
        reason = f"{len(failed)} of {len(by_test)} tests failed"
        entries["reason"] = reason if "exit_status" in outcome else f"{outcome['reason']}; {reason}"
    return entries


def read_sanitizer(outcome: dict, output: str) -> dict:
    """Return the verdict of compute-sanitizer; the step fails if it reports errors or did not finish."""
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
    """Return the JSON file of a benchmark. It is written after every size, so it exists even if time ran out."""
    return {"result": json.loads(path.read_text())} if path.exists() else {}


# ---------------------------------------------------------------- the steps


def find(program: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, searched as setup.py searches nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside = [f"{home}/bin/{program}" for home in (*homes, "/usr/local/cuda")]
    places = [os.environ.get("CUDACXX") if program == "nvcc" else None, shutil.which(program), *beside]
    return next((place for place in places if place and Path(place).exists()), None)


def what_is_missing() -> list[str]:
    """Return what this machine lacks to build and run CUDA code."""
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


def test_command(outcomes: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command of the GPU tests and its environment, with several processes if pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "-p", "bench.gpu.outcome_lines"]
    command.append(f"--outcome-lines={outcomes}")
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH"))))}
    workers = min(WORKERS, os.cpu_count() or 1)
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers use all cores
    return command, environment


def make_steps(scratch: Path, capability: str, outcomes: Path) -> list[Step]:
    """Return all steps in order.

    scratch: folder for the files of benchmarks. capability: of the GPU, as in "90" for 9.0; the build is for this GPU
    alone, because that takes a fraction of the time. outcomes: file for the outcome of each test.
    """
    python, sanitizer = sys.executable, find("compute-sanitizer")
    programs = {"PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # cmake, ninja
    architectures = os.environ.get("SID_KERNELS_CUDA_ARCHS", f"{capability}-real")
    case = [python, "bench/gpu/sanitizer_case.py"]
    no_sanitizer = None if sanitizer else "compute-sanitizer is not installed"
    benchmark, training = scratch / "benchmark.json", scratch / "steps.json"
    tests, environment = test_command(outcomes)

    def sanitize(tool: str, **environment) -> Step:
        words = [sanitizer or "compute-sanitizer", "--tool", tool, "--target-processes", "all"]
        words += ["--error-exitcode", str(SANITIZER_EXIT), *case]
        return Step(
            tool, lambda limit: words, 120, 30, programs | environment, read_sanitizer, False, no_sanitizer, beside=True
        )

    return [
        Step("build", lambda limit: [python, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"],
             120, 45, programs | {"SID_KERNELS_CUDA": "on", "SID_KERNELS_CUDA_ARCHS": architectures}, needed=True),
        Step("backends", lambda limit: [python, "-m", "sid_kernels.info"],
             60, 15, programs, read_backends, needed=True),
        Step("tests", lambda limit: tests, 220, 60, programs | environment,
             lambda outcome, output: read_outcomes(outcomes, outcome)),
        # Without PyTorch's cache each tensor is a separate allocation, so an access beyond its end is an error.
        sanitize("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitize("racecheck"),
        Step("benchmark", lambda limit: [python, "bench/kernels/report.py", "--device", "cuda", f"--out={benchmark}",
                                         f"--budget={max(limit - 45, 20):.0f}"],  # 45 s to finish the last size
             110, 75, programs, lambda outcome, output: read_json(benchmark, outcome)),
        Step("steps", lambda limit: [python, "bench/kernels/step_report.py", "--device", "cuda", f"--out={training}",
                                     "--seconds=2", f"--budget={max(limit - 45, 20):.0f}"],
             90, 60, programs, lambda outcome, output: read_json(training, outcome)),
    ]  # fmt: skip


def summary(outcomes: list[dict]) -> str:
    """Return a line of text for each outcome."""
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
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: bench/results/gpu-NAME.json)")
    parser.add_argument(
        "--total", type=float, default=TOTAL, help="seconds for all steps together (default: %(default)s)"
    )
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="run only these steps (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their time limits, and run none")
    args = parser.parse_args(argv)
    names = [step.name for step in make_steps(Path("."), "90", Path("gpu.tests.jsonl"))]
    if unknown := set(args.steps or ()) - set(names):
        parser.error(f"--steps must be among {', '.join(names)}, not {', '.join(sorted(unknown))}")
    if args.dry_run:
        for step in make_steps(Path("."), "90", Path("gpu.tests.jsonl")):
            words = record.command(step.command(step.limit))
            print(f"{step.name:10s} {step.limit:4.0f} s at most, {step.least:3.0f} s kept free  {words}")
        return 0
    if missing := what_is_missing():
        print(f"gpu: this machine cannot build and run CUDA code; missing: {', '.join(missing)}", file=sys.stderr)
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
        out.parent.mkdir(parents=True, exist_ok=True)
        capability = "".join(map(str, torch.cuda.get_device_capability(0)))
        steps = make_steps(Path(scratch), capability, out.resolve().with_suffix(".tests.jsonl"))
        steps = [step for step in steps if not args.steps or step.name in args.steps]
        outcomes = run_steps(steps, args.total - (time.monotonic() - began), save)
    for outcome in outcomes:
        if "result" in outcome:
            print("\n" + "\n".join(outcome["output_tail"]))
    print(f"\n{summary(outcomes)}\n\n{filed['seconds']:.0f} s in all; written: {out}")
    return 1 if any(outcome["status"] == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
