"""Test the orchestration of `make gpu` (bench/gpu/gpu.py) with harmless commands as its steps; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import gpu
from helpers.processes import forked, wait_until

BENCH = Path(__file__).resolve().parents[2] / "bench"


def step(code, name="step", limit=600.0, least=0.0, **rest):
    return gpu.Step(name, lambda limit: [sys.executable, "-c", code], limit, least, **rest)


def run(steps, total=3600.0):
    return gpu.run_steps(steps, total, lambda outcomes: None)


def test_outcomes_are_told_apart():
    steps = [
        step("print('fine')"),
        step("import sys; print('trouble'); sys.exit(3)"),
        gpu.Step("absent", lambda limit: ["no-such-program-anywhere"], 5.0, 0.0),
        step("", missing="it is not installed"),
    ]
    fine, trouble, absent, skipped = run(steps)
    assert (fine["status"], fine["output_tail"]) == ("passed", ["fine"])
    assert (trouble["status"], trouble["exit_status"], trouble["output_tail"]) == ("failed", 3, ["trouble"])
    assert absent["status"] == "failed" and "no-such-program-anywhere" in absent["reason"]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "it is not installed")


@pytest.fixture
def limit_is_over(monkeypatch):
    """End the limit of a step as soon as an event has come, whatever the clock says."""

    def when(event, what):
        class Popen(subprocess.Popen):
            def wait(self, timeout=None):
                if timeout is None:
                    return super().wait()
                wait_until(event, what)
                raise subprocess.TimeoutExpired(self.args, timeout)

        monkeypatch.setattr(gpu.subprocess, "Popen", Popen)

    return when


def test_a_step_ends_at_its_limit_with_all_it_started(tmp_path, limit_is_over):
    child = tmp_path / "child"
    limit_is_over(child.exists, "a child of the step")
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(6000)'])\n"
        "print('begun', flush=True)\n"
        f"file = pathlib.Path({str(child)!r} + '.new')\n"
        "file.write_text(str(child.pid))\n"
        "file.rename(file.with_suffix(''))\n"
        "time.sleep(6000)\n"
    )
    (outcome,) = run([step(code, limit=3.0)])
    assert outcome["status"] == "failed" and outcome["reason"] == "stopped at its limit of 3 s"
    assert outcome["output_tail"] == ["begun"]
    wait_until(lambda: gone(int(child.read_text())), "the end of the step's child")


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # killed, and not yet reaped by its new parent


def test_total_time_is_kept_and_later_steps_keep_their_share(monkeypatch):
    clock = [100.0]

    class Timed(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None or "sleep" not in self.args[-1]:
                return super().wait()
            clock[0] += timeout
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Timed)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    steps = [
        step("import time; time.sleep(6000)", "long", limit=600.0),
        step("print('ran')", "short", least=4.0),
    ]
    long, short = run(steps, total=7.0)
    assert long["status"] == "failed" and long["limit_seconds"] == long["seconds"] == 3.0
    assert short["status"] == "passed"


def test_a_step_that_no_longer_fits_is_named():
    (outcome,) = run([step("", least=100.0)], total=7.0)
    assert outcome["status"] == "skipped"
    assert outcome["reason"] == "no time left: 7 s, and it takes 100 s at least"


def test_steps_after_a_needed_one_that_failed_are_skipped():
    broken, after = run([step("raise SystemExit(1)", "build", needed=True), step("")])
    assert broken["status"] == "failed"
    assert (after["status"], after["reason"]) == ("skipped", "build failed")


def test_output_is_filed_without_this_machine():
    code = f"print({str(BENCH / 'gpu' / 'gpu.py')!r}, '/opt/somewhere/else/file.py:3', 'https://host.example/simple', '1/2')"
    (outcome,) = run([step(code)])
    assert outcome["output_tail"] == ["bench/gpu/gpu.py .../file.py:3 <address> 1/2"]
    assert os.sep not in outcome["command"].split()[0]


@pytest.mark.parametrize(
    "output, status, verdict",
    (
        ("========= ERROR SUMMARY: 0 errors", "passed", "clean"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", "clean"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "failed", "2 reports"),
        ("========= ERROR SUMMARY: 1 error", "failed", "1 reports"),
        ("", "failed", "not finished"),
        ("========= Error: Device not supported. Please refer to ...", "skipped", "not run"),
    ),
)
def test_sanitizer_verdicts(output, status, verdict):
    (outcome,) = run([step(f"print({output!r})", read=gpu.read_sanitizer)])
    assert (outcome["status"], outcome["verdict"]) == (status, verdict)


TESTS = """
import pytest, time
def test_a(): pass
def test_b(): assert 0, "trouble"
@pytest.mark.skip(reason="one of the outcomes to count")
def test_c(): pass
@pytest.fixture
def broken(): raise ValueError("no ground")
def test_d(broken): pass
"""


def test_step(tmp_path, limit, more="", workers=()):
    (tmp_path / "test_few.py").write_text(TESTS + more)
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += ["-p", "bench.gpu.outcome_lines", f"--outcome-lines={lines}", *workers, str(tmp_path)]
    return gpu.Step(
        "tests", lambda limit: command, limit, 0, {"PYTHONPATH": str(BENCH.parent)},
        read=lambda outcome, _: gpu.read_outcomes(lines, outcome),
    )  # fmt: skip


test_step.__test__ = False


@pytest.mark.parametrize("workers", (0, 2))
def test_counts_of_tests(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    (outcome,) = run([test_step(tmp_path, 600, workers=["-n", str(workers)] if workers else [])])
    assert outcome["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    failed = {name.rpartition("::")[2]: why for name, why in outcome["failed_tests"].items()}
    assert failed == {"test_b": "AssertionError: trouble\nassert 0", "test_d": "ValueError: no ground"}
    assert (outcome["status"], outcome["reason"]) == ("failed", "2 of 4 tests failed")


def test_outcomes_of_tests_survive_the_end_of_their_time(tmp_path, limit_is_over):
    lines = tmp_path / "lines.jsonl"
    limit_is_over(lambda: lines.exists() and lines.read_text().count("\n") == 4, "the outcomes of four tests")
    (outcome,) = run([test_step(tmp_path, 12, "def test_z(): time.sleep(6000)\n")])
    assert outcome["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert outcome["reason"] == "stopped at its limit of 12 s; 2 of 4 tests failed"


def test_steps_beside_each_other(tmp_path):
    """Check that two steps run at the same time: each ends only after the other has started."""

    def meet(own, other):
        return (
            f"import pathlib, time; folder = pathlib.Path({str(tmp_path)!r}); (folder / {own!r}).touch()\n"
            f"while not (folder / {other!r}).exists(): time.sleep(0.01)\n"
        )

    steps = [
        step(meet("one", "two"), "one", least=1.0),
        step(meet("two", "one") + "raise SystemExit(1)", "two", least=3.0, beside=True),
        step("", "absent", missing="it is not installed", least=90.0, beside=True),
        step("print('ran')", "after", least=2.0),
    ]
    outcomes = run(steps)
    assert [o["name"] for o in outcomes] == ["one", "two", "absent", "after"]
    assert [o["status"] for o in outcomes] == ["passed", "failed", "skipped", "passed"]


def test_a_build_without_cuda_is_seen():
    outcome = gpu.read_backends({"status": "passed"}, "backend cpu   usable (avx2)\nbackend cuda  not usable: none\n")
    assert outcome["status"] == "failed" and outcome["reason"] == "backend cuda is not usable: none"


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    out = tmp_path / "results" / "gpu.json"
    gpu.record.write_json(out, {"a": 1})
    assert json.loads(out.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        gpu.record.write_json(out, {"a": object()})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        gpu.record.write_json(out, {"a": 2})
    assert json.loads(out.read_text()) == {"a": 1}
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]


def test_whole_command_with_steps_that_do_nothing(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(gpu, "what_is_missing", lambda: [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU 9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    bad = [step("", "build", needed=True), step("raise SystemExit(1)", "tests")]
    monkeypatch.setattr(gpu, "make_steps", lambda scratch, capability, outcomes: bad if capability == "90" else [])
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 1
    filed = json.loads(out.read_text())
    assert [(s["name"], s["status"]) for s in filed["steps"]] == [("build", "passed"), ("tests", "failed")]
    assert {"machine", "versions", "commit", "date", "command", "seconds"} <= filed.keys()
    assert "tests       failed" in capsys.readouterr().out


def test_no_cuda_is_one_line_and_status_2():
    code = (
        f"import sys, torch; sys.path.insert(0, {str(BENCH.parent)!r}); torch.cuda.is_available = lambda: False; "
        "from bench.gpu import gpu; "
    )
    done = forked(code + "sys.exit(gpu.main([]))")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("gpu: ")]
    assert len(lines) == 1 and "missing: a GPU that PyTorch sees" in lines[0]


def test_dry_run_names_every_step():
    done = subprocess.run([sys.executable, BENCH / "gpu" / "gpu.py", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["build", "backends", "tests", "memcheck", "racecheck", "benchmark", "steps"]
    limits = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert all(limit > 0 for limit in limits)
    kept = [float(line.split("most,")[1].split()[0]) for line in done.stdout.splitlines()]
    assert sum(kept) < 330  # so that a slow step never takes the time of later ones, even if the total is smaller
