"""Test the benchmark at toy sizes: every contender computes the same, and a report is complete."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import sanitizer_case
from bench.kernels import contenders, report

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_contenders_agree_with_float64(dtype):
    problem = contenders.make_problem(37, 11, dtype, "cpu")
    expected = contenders.truth(problem)
    listed, left_out = contenders.contenders("cpu", 37, 11)
    assert set(listed) | set(left_out) == set(contenders.names())
    for contender in listed.values():
        if not contender.compiled:
            contenders.check(contender, problem, expected)


@pytest.mark.parametrize("wrong", ("loss", "belief", "dlogits"))
def test_a_wrong_contender_is_found(wrong):
    problem = contenders.make_problem(5, 7, torch.float32, "cpu")

    def run(*arguments):
        outputs = dict(zip(("loss", "belief", "dlogits"), contenders.without_autograd(*arguments), strict=True))
        outputs[wrong] = outputs[wrong] * 1.001
        return tuple(outputs.values())

    with pytest.raises(AssertionError, match=f"{wrong} is off by"):
        contenders.check(contenders.Contender("bad", "", run), problem, contenders.truth(problem))


def test_traffic_is_what_must_move():
    problem = contenders.make_problem(6, 10, torch.bfloat16, "cpu")
    assert problem.minimum_traffic == 4 * 6 * 10 * 2 + 6 * 8
    assert problem.clone_traffic == 4 * 6 * 10 * 2


def test_report_and_plot(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "cpu.json", tmp_path / "bench.png"
    words = ["--sizes", "8x5", "16x9", "--rounds", "4", "--device", "cpu", "--skip", "compiled"]
    monkeypatch.setattr(sys, "argv", [str(BENCH / "kernels" / "report.py"), "--out", str(out), *words])  # is filed
    assert report.main() == 0
    printed = capsys.readouterr().out
    assert " us" not in printed and "GB/s" not in printed  # on a CPU the table shows ratios only
    filed = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "command", "date"} <= filed.keys()
    assert [(r["rows"], r["classes"], r["dtype"]) for r in filed["results"]] == [
        (8, 5, "float32"), (8, 5, "bfloat16"), (16, 9, "float32"), (16, 9, "bfloat16"),
    ]  # fmt: skip
    for entry in filed["results"]:
        rows, clone = entry["contenders"], entry["contenders"]["clone"]
        assert {"clone", "eager four-op", "eager collapsed", "fused_local_loss", "local_loss_and_grad"} <= rows.keys()
        assert entry["rounds"] == 4 and entry["left_out"]["liger kl_div"] and clone["share_of_clone"] == 1.0
        ours = rows["local_loss_and_grad"]
        bandwidth = entry["minimum_traffic_bytes"] / ours["seconds"]
        assert ours["share_of_clone"] == pytest.approx(
            bandwidth / (entry["clone_traffic_bytes"] / clone["seconds"]), rel=1e-6
        )
        ratio = entry["ratios"]["local_loss_and_grad"]["eager four-op"]["of_medians"]
        assert ratio == pytest.approx(rows["eager four-op"]["seconds"] / ours["seconds"], rel=1e-6)
    assert str(BENCH.parent) not in out.read_text() and str(tmp_path) not in out.read_text()
    assert report.main(["--plot", str(out), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sanitizer_case_agrees_with_the_reference(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanitizer_case.py", "--backend", "cpu"])
    assert sanitizer_case.main() == 0
