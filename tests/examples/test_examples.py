"""Run every script of examples/ in a process of its own, from outside the checkout."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from helpers.processes import forked

EXAMPLES = Path(os.environ.get("SID_EXAMPLES", Path(__file__).parents[2] / "examples"))
NEEDS_TRAINER = {"cut_network.py", "sid_and_bp.py", "export_network.py"}


def check_own_loop(lines: list[str]) -> None:
    losses = [float(line.split("loss of the last stage")[1].split()[0]) for line in lines]
    assert losses[-1] < 0.3 * losses[0], lines


def check_large_vocabulary(lines: list[str]) -> None:
    losses = [float(line.split("loss")[1]) for line in lines if line.startswith("step")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5, lines
    assert "most likely tokens" in lines[-1]


def accuracies(lines: list[str]) -> list[float]:
    return [float(actual) for line in lines for actual in re.findall(r"test accuracy ([\d.]+)%", line)]


def check_cut_network(lines: list[str]) -> None:
    assert len(accuracies(lines)) == 3 and min(accuracies(lines)) > 60, lines  # chance: 10%


def check_sid_and_bp(lines: list[str]) -> None:
    assert len(accuracies(lines)) == 3 and min(accuracies(lines)) > 60, lines
    sid, _, bp = (float(line.split("held for backward")[1].split()[0]) for line in lines)
    assert sid < bp, lines  # one stage's activations against the whole network's


def check_export_network(lines: list[str]) -> None:
    assert lines[-1] == "logits without sid_kernels: (5, 10)", lines


CHECKS = {
    "own_loop.py": check_own_loop,
    "large_vocabulary.py": check_large_vocabulary,
    "cut_network.py": check_cut_network,
    "sid_and_bp.py": check_sid_and_bp,
    "export_network.py": check_export_network,
}


def test_every_example_is_checked():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CHECKS)


SLOW = ("sid_and_bp.py", "export_network.py")


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow if s in SLOW else ()) for s in CHECKS])
def test_example(script, tmp_path):
    if script in NEEDS_TRAINER and importlib.util.find_spec("sklearn") is None:
        pytest.skip("needs the trainer's dependencies: pip install -e '.[trainer]'")
    done = forked(f"import runpy; runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    CHECKS[script](done.stdout.splitlines())
