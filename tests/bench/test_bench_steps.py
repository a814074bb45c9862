"""Test the benchmark of the cascade's step and the belief head at toy sizes: its checks, counts and report."""

import functools
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from bench.kernels import cascade_contenders as cascade
from bench.kernels import head_contenders as head
from bench.kernels import step_report
from bench.lib import footprint

BENCH = Path(__file__).resolve().parents[2] / "bench"
CASCADE, HEAD = (3, 8, 6, 5, 4), (37, 8, 11)


def passes(module, contender, problem, expected):
    return module.check(contender, contender.run(problem), problem, expected)


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_cascade_contenders_agree_with_float64():
    problem = cascade.make_problem(CASCADE, "cpu")
    before = [x.clone() for x in problem.network.parameters()]
    listed, left_out = cascade.contenders("cpu", problem)
    assert set(listed) | set(left_out) == set(cascade.names())
    captured = cascade.Contender("captured", "", functools.partial(cascade.in_trainer, captured=True))  # here: the step
    for contender in [*listed.values(), captured]:
        if not contender.compiled:
            passes(cascade, contender, problem, cascade.truth(problem))
    for parameter, old in zip(problem.network.parameters(), before, strict=True):  # each had its own copy
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(("dtype", "size"), [("float32", HEAD), ("bfloat16", HEAD), ("float32", (5, 7, 300))])
@pytest.mark.parametrize("prior", ("given", "none", "head"))
def test_head_contenders_agree_with_float64(prior, dtype, size):
    problem = head.make_problem((*size, dtype, prior), "cpu")
    listed, left_out = head.contenders("cpu", problem)
    assert set(listed) | set(left_out) == set(head.names())
    for contender in listed.values():
        if not contender.compiled:
            errors = passes(head, contender, problem, head.truth(problem))
            assert errors.keys() >= {"loss", "hidden", "weight", "bias"}
            assert ("belief" in errors) == (contender.name == head.BELIEF)


@pytest.mark.parametrize("wrong", ("features", "hidden_weight", "logits_bias", "update"))
def test_a_wrong_cascade_step_is_found(wrong):
    problem = cascade.make_problem(CASCADE, "cpu")

    def start(network, features, target):
        run = cascade.in_trainer(network, features, target)

        def step():
            dfeatures = run.step()
            weights = run.network.stages.weights
            if wrong == "features":
                return dfeatures * 1.001
            with torch.no_grad():
                if wrong == "update":
                    weights.hidden_weight[0].add_(1e-5)
                else:
                    getattr(weights, wrong).grad[0].mul_(1.01)
            return dfeatures

        return run._replace(step=step)

    with pytest.raises(AssertionError, match=f"{wrong} is off by"):
        passes(cascade, cascade.Contender("bad", "", start), problem, cascade.truth(problem))


def test_backpropagated_gradients_do_not_vanish_into_denormal_numbers():
    """Check that gradients and their squares in Adam are not denormal, whose arithmetic would be timed instead."""
    problem = cascade.make_problem((10, 16, 32, 8, 300), "cpu")
    first = cascade.truth(problem)[True]["hidden_weight"][0]
    assert first[first != 0].abs().median() > 1e-16


def test_backpropagation_is_not_taken_for_the_local_gradient():
    problem = cascade.make_problem(CASCADE, "cpu")
    contender = cascade.contenders("cpu", problem)[0][cascade.BP]._replace(backpropagates=False)
    with pytest.raises(AssertionError, match="gradient of features is off by"):
        passes(cascade, contender, problem, cascade.truth(problem))


@pytest.mark.parametrize("wrong", ("loss", "belief", "hidden", "weight", "bias"))
def test_a_wrong_head_is_found(wrong):
    problem = head.make_problem((*HEAD, "float32", "head"), "cpu")

    def call(problem):
        loss, belief, gradients = head.through_autograd(problem, return_belief=True)
        results = dict(zip(("loss", "belief", "hidden", "weight", "bias"), (loss, belief, *gradients), strict=True))
        results[wrong] = results[wrong] * 1.001
        loss, belief, *gradients = results.values()
        return loss, belief, tuple(gradients)

    with pytest.raises(AssertionError, match=f"{wrong} is off by"):
        passes(head, head.Contender("bad", "", call), problem, head.truth(problem))


def test_those_that_do_less_are_held_to_what_they_compute(monkeypatch):
    """Check Liger-Kernel's operations by stand-ins: cross-entropy with labels, KL(prior || belief) without biases."""
    functional = torch.nn.functional

    def cross_entropy(hidden, weight, target, bias=None):
        return functional.cross_entropy(functional.linear(hidden, weight, bias), target)

    def jsd(hidden, weight, prior_hidden, prior_weight, labels, beta):
        assert labels is None and beta == 0.0
        prior = (prior_hidden @ prior_weight.t()).softmax(-1)
        return functional.kl_div((hidden @ weight.t()).log_softmax(-1), prior, reduction="batchmean")

    names = {"liger_fused_linear_cross_entropy": cross_entropy, "liger_fused_linear_jsd": jsd}
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**names))
    monkeypatch.setattr(head, "no_liger", lambda device: None)
    problem = head.make_problem((*HEAD, "float32", "head"), "cpu")
    listed, _ = head.contenders("cpu", problem)
    for name in (head.LIGER, head.LIGER_JSD):
        passes(head, listed[name], problem, head.truth(problem))
        with pytest.raises(AssertionError, match="is off by"):
            passes(head, listed[name]._replace(target="mixed", value="loss"), problem, head.truth(problem))
    problem = head.make_problem((*HEAD, "float32", "none"), "cpu")
    assert head.LIGER_JSD in head.contenders("cpu", problem)[1]


# ---- operators and memory --------------------------------------------------------------------------------------------


def test_operators_of_a_known_call():
    from sid_kernels import local_loss_and_grad

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert footprint.operators(lambda: (x + y) * 2) == 2
    assert footprint.operators(lambda: torch.nn.functional.linear(x, y)) == 1  # not what it calls itself
    labels, prior = torch.zeros(4, dtype=torch.int64), y.softmax(-1)
    calls = footprint.operators(lambda: local_loss_and_grad(x, prior, labels, 0.5))
    assert calls == 5 + 1  # the five outputs' memory and the kernel


def test_costs_of_the_cascade():
    """Check that gradients count once, wherever they are kept, and that a step calls few operators at any depth."""
    operators = []
    for stages in (2, 6):
        problem = cascade.make_problem((stages, *CASCADE[1:]), "cpu")
        listed, _ = cascade.contenders("cpu", problem)
        costs = {}
        for name in (cascade.DIRECT, cascade.TRAINER, cascade.REFERENCE):
            run = listed[name].run(problem)
            costs[name] = step_report.costs(listed[name], run, "cpu")
            gradients = sum(x.numel() * 4 for x in (problem.features, *problem.network.parameters()))
            assert run.returned == gradients
            assert costs[name]["peak_bytes"] >= gradients
            assert costs[name]["peak_bytes_beyond_results"] == costs[name]["peak_bytes"] - gradients
        operators.append({name: cost["calls"] for name, cost in costs.items()})
    assert operators[0][cascade.TRAINER] == operators[1][cascade.TRAINER]
    assert operators[0][cascade.REFERENCE] < operators[1][cascade.REFERENCE]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_report_and_plot(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    words = ["--cascades", "2x8x6x5x4", "--heads", "16x4x9:bfloat16", "--rounds", "3", "--device", "cpu"]
    words += ["--skip", "compiled", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(BENCH / "kernels" / "step_report.py"), *words])  # is filed
    assert step_report.main() == 0
    printed = capsys.readouterr().out
    assert " us" not in printed and "operators" in printed  # on a CPU the table shows ratios only
    filed = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "command", "date", "settings"} <= filed.keys()
    assert [(e["operation"], e["size"]) for e in filed["results"]] == [
        ("cascade", [2, 8, 6, 5, 4]), *(("head", [16, 4, 9, "bfloat16", prior]) for prior in ("given", "none", "head")),
    ]  # fmt: skip
    for entry in filed["results"]:
        assert entry["rounds"] == 3 and not entry["failed"] and entry["left_out"]
        assert set(entry["contenders"]) <= set(filed["contenders"])
        for name, row in entry["contenders"].items():
            assert row["seconds"] > 0 and row["calls"] > 0 and row["peak_bytes"] > row["peak_bytes_beyond_results"] >= 0
            assert max(row["errors"].values()) < 0.03, name
    ratio = filed["results"][0]["ratios"]["sid_step"]["BP step"]["of_medians"]
    contenders = filed["results"][0]["contenders"]
    assert ratio == pytest.approx(contenders["BP step"]["seconds"] / contenders["sid_step"]["seconds"], rel=1e-6)
    assert str(BENCH.parent) not in out.read_text() and str(tmp_path) not in out.read_text()
    assert step_report.main(["--plot", str(out), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--cascades", "10x128"], "argument --cascades: '10x128': a size is written LxBxHxDxC"),
        (["--heads", "8x4x0"], "argument --heads: '8x4x0': a size is written NxHxC"),
        (["--heads", "8x4x5:float8"], "'8x4x5:float8': the dtype must be one of float32, bfloat16"),
        (["--only", "nothing"], "--only nothing: no case's label contains that"),
        (["--plot", "missing.json"], "--plot: missing.json cannot be read: FileNotFoundError"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as stopped:
        step_report.main(["--out", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed
