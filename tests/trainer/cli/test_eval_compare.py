"""Test `sid eval`, which repeats the last epoch's metrics, and `sid compare`, which continues after a stop."""

import json
import statistics

import pytest
from PIL import Image

from helpers.image_sets import write_image_folder
from helpers.killed import assert_same, rows_of, sid, state_of
from sid_trainer.cli import main
from sid_trainer.runs.build import evaluate_run

pytestmark = pytest.mark.usefixtures("blank_pictures")


def last_row(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("words", [
    "--arch mlp --layout stagewise --depth 3 --alpha 0.9:0.3",
    "--arch simple_cnn --layout shared --depth 3",
    "--arch mlp --layout stagewise --depth 2 --divergence reverse --label-smoothing 0.1",
    "--arch mlp --layout stagewise --method bp",
    "--arch mlp --layout stagewise --depth 3 --method greedy --label-smoothing graded",
    "--arch mlp --layout shared --depth 2 --dtype bfloat16 --method greedy",
    "--arch vgg11 --layout stagewise --train-images 60 --val 0.2 --label-noise 0.4",
])  # fmt: skip
def test_eval_equals_the_last_epoch(words, tmp_path, capsys):
    common = ["--train-images", "200", "--batch-size", "64", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *common, *words.split()]) == 0
    row, actual = last_row(tmp_path / "run"), evaluate_run(tmp_path / "run")
    assert actual["accuracy"] == row["stage_accuracy"] and actual["images"] == 360
    assert actual["kl"] == pytest.approx(row["stage_kl"], rel=1e-5)
    assert actual["certificate"] == pytest.approx(
        row["certificate"], abs=1.5 / 360
    )  # rounding may change the class of one image
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "stage   accuracy   KL(y|p)   certificate   on 360 test images"
    depth = len(row["stage_kl"])
    ways = [line.split()[0] for line in printed[2 + depth :]]
    assert ways == (["plain", "averaged"] if "plain" in actual else [])
    assert ("plain" in actual) == ("stagewise" in words and depth > 1)
    assert all(f"{actual[line.split()[0]]:.2%}" in line for line in printed[2 + depth :])
    for stage, line in enumerate(printed[2 : 2 + depth]):
        number, accuracy, kl, certificate = line.split()
        assert int(number) == stage + 1 and accuracy == f"{row['stage_accuracy'][stage]:.2%}"
        assert float(kl) == pytest.approx(row["stage_kl"][stage], abs=1.1e-4) and certificate.endswith("%")


def test_eval_of_early_exits(tmp_path, capsys):
    words = ["--arch", "mlp", "--layout", "stagewise", "--depth", "2", "--epochs", "1", "--train-images", "200"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    assert "operations per image: " in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run"), "--exit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[lines.index("") :] if line}
    assert rows["all"][1] == f"{last_row(tmp_path / 'run')['test_accuracy']:.2%}" and rows["all"][3:] == ["0%", "100%"]
    operations = [float(rows[name][2].replace(",", "")) for name in ("0.5", "0.9", "0.999", "all", "plain")]
    assert operations[4] < operations[3] and sorted(operations[:4]) == operations[:4]
    with Image.open(tmp_path / "run" / "exit.png") as picture:
        assert picture.width > 500
    assert main(["train", *words, "--method", "bp", "--out", str(tmp_path / "bp")]) == 0
    assert main(["eval", str(tmp_path / "bp"), "--exit"]) == 2
    assert "exit needs a network of several stages" in capsys.readouterr().err


def test_eval_on_a_moved_data_set(tmp_path, capsys):
    data = write_image_folder(tmp_path / "set", count=8)
    cache = ["--cache", str(tmp_path / "cache")]
    words = ["--arch", "mlp", "--layout", "stagewise", "--depth", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", "--data", str(data), *cache, *words]) == 0
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"sid eval: error: {data}: no such folder\n"
    assert main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "moved"), *cache]) == 0
    accuracy = capsys.readouterr().out.splitlines()[3].split()[1]  # of the second stage, the last
    assert accuracy == f"{last_row(tmp_path / 'run')['test_accuracy']:.2%}"


@pytest.fixture(scope="module")
def on_a_folder(tmp_path_factory, blank_pictures):
    """Return the folder of a run on a small image folder."""
    folder = tmp_path_factory.mktemp("on a folder")
    data, out = write_image_folder(folder / "set", count=8), folder / "run"
    words = ["train", "--data", str(data), "--cache", str(folder / "cache"), "--out", str(out)]
    assert main([*words, "--arch", "mlp", "--layout", "stagewise", "--depth", "2", "--epochs", "1"]) == 0
    return out


@pytest.mark.parametrize(("other", "difference"), [
    ({"size": (6, 6)}, "image_size [8, 8], not [6, 6]"),
    ({"classes": ("a", "b")}, "class 1 'b c', not 'b'"),
    ({"classes": ("a", "b c", "d")}, "class 2 None, not 'd'"),
    ({"count": 7}, "train_images 16, not 14"),
    ({"splits": ("test", "train")}, "pixel_mean ["),
])  # fmt: skip
def test_eval_and_resume_refuse_another_data_set(on_a_folder, tmp_path, capsys, other, difference):
    run, cache = on_a_folder, ["--cache", str(tmp_path / "cache")]
    write_image_folder(tmp_path / "other", **{"count": 8} | other)
    before = {file: file.read_bytes() for file in run.iterdir()}
    for command in (["train", "--resume"], ["eval"]):
        capsys.readouterr()
        status = main([*command, str(run), "--data", str(tmp_path / "other"), *cache])
        printed = capsys.readouterr().err
        if command == ["eval"] and difference.startswith(("train_images", "pixel_mean")):
            assert status == 0  # eval accepts other images of the same classes and size
        else:
            line = f"sid {command[0]}: error: {run}: saved by a run with {difference}"
            assert status == 2 and printed.startswith(line) and printed.count("\n") == 1
    assert {file: file.read_bytes() for file in run.iterdir()} == before


# ---------------------------------------------------------------- compare

SETTINGS = "--arch mlp --depth 2 --hidden-dim 16 --train-images 200 --batch-size 64 --epochs 2".split()
COMPARE = ["compare", "--methods", "sid", "bp", "--seeds", "0", "1", *SETTINGS]
NAMES = [f"stagewise-{method}-seed{seed}" for method in ("sid", "bp") for seed in (0, 1)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of an uninterrupted comparison, and what it printed."""
    out = tmp_path_factory.mktemp("compare") / "uninterrupted"
    status, printed = sid(*COMPARE, "--out", out, out=out, draw=True)
    assert status == 0, printed
    return out, printed


def check_same(out, uninterrupted):
    for name in NAMES:
        assert_same(state_of(out / name), state_of(uninterrupted / name))
        assert rows_of(out / name) == rows_of(uninterrupted / name) and len(rows_of(out / name)) == 2
    tables = [json.loads((folder / "table.json").read_text())["table"] for folder in (out, uninterrupted)]
    for rows in tables:
        for row in rows:
            del row["images_per_second"], row["peak_memory_bytes"]
    assert tables[0] == tables[1]


def test_compare_trains_every_cell_and_writes_table_and_report(uninterrupted):
    out, printed = uninterrupted
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(NAMES)
    for i, name in enumerate(NAMES, 1):
        assert f"\n[{i}/4] {name}\n" in printed
    record = json.loads((out / "table.json").read_text())
    assert record["settings"]["epochs"] == 2 and record["settings"]["train_images"] == 200
    assert "method" not in record["settings"] and "seed" not in record["settings"]
    assert [row["method"] for row in record["table"]] == ["sid", "bp"]
    markdown = (out / "table.md").read_text()
    assert markdown in printed and f"report: {out / 'report.html'}" in printed
    for row in record["table"]:
        accuracies = [last_row(out / f"stagewise-{row['method']}-seed{seed}")["test_accuracy"] for seed in (0, 1)]
        assert (row["n"], row["seeds"], row["epochs"]) == (2, [0, 1], [2])
        assert row["test_accuracy"] == pytest.approx(statistics.mean(accuracies))
        assert row["deviation"] == pytest.approx(statistics.stdev(accuracies))
        assert f"{row['test_accuracy']:.2%} ± {100 * row['deviation']:.2f}" in markdown
    page = (out / "report.html").read_text()
    assert all(name in page for name in NAMES)
    seeds = [json.loads((out / name / "config.json").read_text())["seed"] for name in NAMES]
    assert seeds == [0, 1, 0, 1]


def rare(*place):
    return pytest.param(place, marks=pytest.mark.slow)


@pytest.mark.parametrize("place", [
    rare("sid_trainer.training.trainer.Trainer.train_step", 3),  # in the first run's first epoch, before a save
    rare("sid_trainer.training.trainer.Trainer.train_step", 6),  # in its second epoch
    ("sid_trainer.training.trainer.Trainer.train_step", 18),  # in the third run
    rare("sid_trainer.training.trainer.Trainer.save", 4),  # the second run is trained, but not saved
    ("sid_trainer.training.logs.Log.add", 4),  # ... saved, but not in metrics.jsonl
    rare("sid_trainer.runs.compare.write_table", 1),
])  # fmt: skip
def test_a_killed_comparison_continues(uninterrupted, tmp_path, place):
    out = tmp_path / "killed"
    status, _ = sid(*COMPARE, "--out", out, out=out, kill=place)
    assert status == -9 and not (out / "table.json").exists()
    done = {name: (out / name / "last.pt").read_bytes() for name in NAMES if len(rows_in(out / name)) == 2}
    status, printed = sid(*COMPARE, "--out", out, out=out)
    assert status == 0, printed
    check_same(out, uninterrupted[0])
    for i, name in enumerate(NAMES, 1):
        assert (f"[{i}/4] {name}" in printed) == (name not in done)
        assert name not in done or (out / name / "last.pt").read_bytes() == done[name]


def test_a_comparison_continues_with_a_moved_data_set(tmp_path):
    data, out = write_image_folder(tmp_path / "set", count=8), tmp_path / "out"
    words = "compare --methods sid --seeds 0 --arch mlp --depth 2 --hidden-dim 8 --epochs 2 --batch-size 8".split()
    words += ["--workers", "0", "--cache", tmp_path / "cache", "--out", out, "--data"]
    status, _ = sid(*words, data, out=out, kill=("sid_trainer.training.trainer.Trainer.train_step", 4))
    assert status == -9 and len(rows_in(out / "stagewise-sid-seed0")) == 1
    data.rename(tmp_path / "moved")
    status, printed = sid(*words, tmp_path / "moved", "--save-every", "1", out=out)
    assert status == 0, printed
    config = json.loads((out / "stagewise-sid-seed0" / "config.json").read_text())
    assert config["data"] == str(tmp_path / "moved") and config["save_every"] == 1


def rows_in(folder):
    return (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []


def test_a_finished_comparison_trains_nothing(uninterrupted, monkeypatch):
    out, _ = uninterrupted
    before = {name: (out / name / "last.pt").stat().st_mtime_ns for name in NAMES}
    monkeypatch.setattr("sid_trainer.training.trainer.Trainer.fit", lambda self: pytest.fail("trained again"))
    assert main([*COMPARE, "--out", str(out)]) == 0
    assert {name: (out / name / "last.pt").stat().st_mtime_ns for name in NAMES} == before


@pytest.mark.parametrize(("words", "name", "saved", "asked"), [
    ("--epochs 3", "epochs", "2", "3"),
    ("--lr 0.5", "lr", "0.001", "0.5"),
    ("--train-images 100", "train_images", "200", "100"),
    ("--crop 1", "crop", "None", "1"),
    ("--alpha 0.9:0.1", "alpha", "0.5", "'0.9:0.1'"),
])  # fmt: skip
def test_runs_with_other_settings_are_refused_before_training(
    uninterrupted, monkeypatch, capsys, words, name, saved, asked
):
    out, _ = uninterrupted
    monkeypatch.setattr("sid_trainer.training.trainer.Trainer.fit", lambda self: pytest.fail("trained"))
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    asked_for = ["compare", "--methods", "greedy", "sid", *COMPARE[4:], *words.split()]  # there is no run of greedy yet
    assert main([*asked_for, "--out", str(out)]) == 2
    line = f"{out / NAMES[0]}: saved by a run with {name} {saved}, not {asked}"
    assert capsys.readouterr().err == f"sid compare: error: {line}\n"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize(("words", "line"), [
    ("--label-noise 0 2", "label_noise must be in [0, 1], not 2.0"),
    ("--val 1", "val must be in [0, 1), not 1.0"),
    ("--arch vgg11 --layouts shared stagewise --depth 4", "depth must be 5 for a stagewise vgg11, not 4"),
    ("--layouts shared stagewise --arch mlp --alpha 0.1,0.2,0.3,0.4",
     "alpha must be one number or one for each of the 10 stages, not 4"),
    ("--methods bp sid --arch mlp --depth 3 --alpha 0.1,0.2",
     "alpha must be one number or one for each of the 3 stages, not 2"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_training(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.setattr("sid_trainer.runs.compare.make_trainer", lambda *_: pytest.fail("trained"))
    assert main(["compare", "--seeds", "0", *words.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"sid compare: error: {line}\n" and not (tmp_path / "out").exists()


def test_label_noises_and_layouts_are_compared(tmp_path, capsys):
    words = "compare --methods sid --layouts shared stagewise --seeds 4 --label-noise 0 0.4".split()
    small = "--arch mlp --depth 2 --hidden-dim 8 --train-images 60 --batch-size 60 --epochs 1".split()
    assert main([*words, *small, "--out", str(tmp_path)]) == 0
    names = [f"{layout}-sid{noise}-seed4" for layout in ("shared", "stagewise") for noise in ("", "-noise0.4")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(names)
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert {(row["layout"], row["label_noise"]) for row in table} == {
        (layout, noise) for layout in ("shared", "stagewise") for noise in (0.0, 0.4)
    }
    assert all(row["deviation"] is None and row["n"] == 1 for row in table)
