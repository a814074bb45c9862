"""Test `sid report` and the tables of `sid compare`: run folders are read, grouped by seed, tabulated and drawn."""

import json
import math
import struct
from html.parser import HTMLParser

import pytest

from sid_trainer.methods.factory import METHODS
from sid_trainer.report import results
from sid_trainer.report.figures import draw_run, format_bytes
from sid_trainer.report.page import as_markdown, comparison_text, write_report
from sid_trainer.report.results import comparison_table, load_runs
from sid_trainer.training.config import MOVABLE

NEW_KEYS = ("certificate", "elapsed", "activation_bytes", "peak_memory_bytes")


def row(epoch, accuracy, stages=2):
    return {
        "epoch": epoch, "step": 10 * epoch, "lr": 1e-3, "train_loss": 2 / epoch, "train_accuracy": accuracy,
        "stage_loss": [2 / epoch] * stages, "test_accuracy": accuracy,
        "stage_accuracy": [accuracy - 0.1] * (stages - 1) + [accuracy], "stage_kl": [1.5, 0.75, 0.4, 0.2][:stages],
        "certificate": [0.5, 0.75, 0.8, 0.9][:stages], "images_per_second": 100.0 * epoch, "seconds": 3.0,
        "elapsed": 3.0 * epoch, "activation_bytes": 3 * 2**20, "peak_memory_bytes": 5 * 2**20,
    }  # fmt: skip


def write_run(folder, accuracies=(0.4, 0.6), stages=2, without=(), over_ranks=(), **config):
    rows = [row(epoch, accuracy, stages) for epoch, accuracy in enumerate(accuracies, 1)]
    for epoch in over_ranks:
        rows[epoch - 1]["pipeline"] = {}
    rows = [{key: value for key, value in one.items() if key not in without} for one in rows]
    about = {
        "method": "sid", "arch": "simple_cnn", "layout": "shared", "depth": stages, "classes": ["cat", "dog", "emu"],
        "alpha": [0.5] * stages, "epochs": len(accuracies), "seed": 0, "label_noise": 0.0, "data": str(folder),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**about, **config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


class Tables(HTMLParser):
    """The cells of a page's tables, its other text, and the tags in it."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.tables[-1][-1][-1] += data

    def rows(self, title):
        """Return the rows, as dicts, of the first table with that column."""
        titles, *rows = next(table for table in self.tables if title in table[0])
        return [dict(zip(titles, one, strict=True)) for one in rows]


def png_size(content):
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def compared(folders):
    return comparison_table(load_runs(folders).runs).to_dict("records")


def test_constants_that_the_report_repeats():
    """Compare the constants that the report repeats, because it reads folders only and imports nothing of training."""
    assert results.METHODS == METHODS
    assert set(MOVABLE) - {"device"} <= results.NOT_SETTINGS


def test_operations_follow_from_settings_and_are_not_named(tmp_path):
    folders = [
        write_run(tmp_path / f"{depth}-{seed}", stages=depth, seed=seed, operations={"training": depth})
        for depth in (2, 3)
        for seed in (0, 1)
    ]
    assert [(one["n"], one["settings"]) for one in compared(folders)] == [
        (2, "depth 2, alpha 0.5"),
        (2, "depth 3, alpha 0.5"),
    ]


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path):
    folders = [
        write_run(tmp_path / f"sid{seed}", (0.3, last), seed=seed) for seed, last in ((2, 0.7), (0, 0.6), (1, 0.8))
    ]
    folders.append(write_run(tmp_path / "bp", (0.3, 0.5), stages=1, method="bp", without=("activation_bytes",)))
    sid, bp = compared(folders)
    assert sid["test_accuracy"] == pytest.approx(0.7)
    assert sid["deviation"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2) / 2))  # over n - 1
    assert (sid["n"], sid["seeds"], sid["epochs"]) == (3, [0, 1, 2], [2])
    assert sid["images_per_second"] == 150.0 and sid["activation_bytes"] == 3 * 2**20
    assert bp["n"] == 1 and math.isnan(bp["deviation"]) and math.isnan(bp["activation_bytes"])
    lines = as_markdown(comparison_text(load_runs(folders).runs)).splitlines()
    assert "| 70.00% ± 10.00 | 3 | 0, 1, 2 | 2 | 150 | 3 MiB |" in lines[2]
    assert "| 50.00% | 1 | 0 | 2 | 150 | – |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_other_settings_than_the_seed_are_not_averaged_over(tmp_path):
    folders = [
        write_run(tmp_path / "a", (0.5,), alpha=[0.5, 0.5], seed=0),
        write_run(tmp_path / "b", (0.7,), alpha=[0.5, 0.5], seed=1),
        write_run(tmp_path / "c", (0.9,), alpha=[0.9, 0.3], seed=0),
        write_run(tmp_path / "d", (0.2,), label_noise=0.4, seed=0),
        write_run(tmp_path / "e", (0.1,), label_noise=0.4, seed=0, classes=["other", "names"]),
    ]
    actual = [(one["label_noise"], one["settings"], one["test_accuracy"]) for one in compared(folders)]
    assert actual[:2] == [(0.0, "alpha 0.5", pytest.approx(0.6)), (0.0, "alpha 0.9, 0.3", 0.9)]
    assert sorted(actual[2:]) == [(0.4, "", 0.1), (0.4, "", 0.2)]
    assert "alpha 0.9, 0.3" in as_markdown(comparison_text(load_runs(folders).runs))


def test_runs_stand_by_architecture_layout_noise_method_and_seed(tmp_path):
    kinds = [
        ("mlp", "stagewise", 0.0, "sid", 0), ("mlp", "shared", 0.4, "sid", 0), ("mlp", "shared", 0.0, "bp", 0),
        ("mlp", "shared", 0.0, "another", 0), ("mlp", "shared", 0.0, "sid", 1), ("mlp", "shared", 0.0, "sid", 0),
        ("cnn", "stagewise", 0.4, "bp", 7),
    ]  # fmt: skip
    names = ("arch", "layout", "label_noise", "method", "seed")
    folders = [write_run(tmp_path / str(i), **dict(zip(names, kind, strict=True))) for i, kind in enumerate(kinds)]
    runs = load_runs(folders).runs
    assert list(runs["name"]) == ["6", "5", "4", "2", "3", "1", "0"]
    assert list(runs["group"]) == [0, 1, 1, 2, 3, 4, 5]


def test_a_bar_in_a_name_does_not_break_the_markdown_table(tmp_path):
    run = write_run(
        tmp_path / "run", (0.5,), arch="a|b", layout=None, without=(*NEW_KEYS, "seconds", "images_per_second")
    )
    line = as_markdown(comparison_text(load_runs([run]).runs)).splitlines()[2]
    assert line == "| a\\|b | sid | 0% | 50.00% | 1 | 0 | 1 |"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (3.5 * 2**20, "3.5 MiB"), (2**45, "32768 GiB")],
)
def test_bytes_have_a_unit(count, text):
    assert format_bytes(count) == text


def test_runs_that_differ_in_who_started_them_are_one_group(tmp_path):
    starts = ({}, {"launch": None}, {"launch": "here"}, {"launch": "there"})
    folders = [write_run(tmp_path / f"r{seed}", (0.6,), seed=seed, **start) for seed, start in enumerate(starts)]
    page = write_report(folders, tmp_path / "out")
    assert [one["seeds"] for one in Tables(page.read_text()).rows("accuracy, last epoch")] == ["0, 1, 2, 3"]


def test_the_page_holds_the_numbers_and_needs_no_other_file(tmp_path):
    folders = [write_run(tmp_path / f"r{seed}", (0.4, 0.6 + seed / 10), seed=seed) for seed in (0, 1)]
    folders.append(write_run(tmp_path / "short", (0.25,), method="greedy", epochs=2, lr=0.125))
    page = write_report(folders, tmp_path / "out" / "deep")
    assert page == tmp_path / "out" / "deep" / "report.html"
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.png"]
    parsed = Tables(page.read_text())
    by_method = parsed.rows("accuracy, last epoch")
    assert [one["accuracy, last epoch"] for one in by_method] == ["65.00% ± 7.07", "25.00%"]
    runs = {one["run"]: one for one in parsed.rows("best stage")}
    assert runs["r1"] == {
        "run": "r1", "arch": "simple_cnn", "layout": "shared", "method": "sid", "label noise": "0%", "depth": "2",
        "seed": "1", "epochs": "2", "test accuracy": "70.00%", "best stage": "70.00%", "first stage": "60.00%",
        "KL of the last stage": "0.7500", "certificate": "62.50%", "images/s": "150", "training seconds": "6.0",
        "held for backward": "3 MiB", "peak memory": "5 MiB",
    }  # fmt: skip
    assert runs["short"]["epochs"] == "1 of 2"
    differing = parsed.rows("lr")
    assert [(one["run"], one["lr"], one["seed"]) for one in differing] == [
        ("r0", "–", "0"),
        ("r1", "–", "1"),
        ("short", "0.125", "0"),
    ]
    same = {one["setting"]: one["value"] for one in parsed.rows("setting")}
    assert same["classes"] == "cat, dog, emu" and same["epochs"] == "2" and not same.keys() & {"seed", "lr", "data"}
    images = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,iVBORw0KGgo")
    assert not any(tag in ("script", "link", "iframe") for tag, _ in parsed.tags)
    width, height = png_size((page.parent / "report.png").read_bytes())
    assert width >= 1500 and height >= 1000


def test_names_are_only_text(tmp_path):
    odd = "<script>alert('$x$^')</script>"
    folders = [
        write_run(tmp_path / "a" / "$\\frac{$", classes=[odd, "b"], method="<b>", arch=odd, lr=odd),
        write_run(tmp_path / "b" / "<script>alert(1)<", classes=[odd, "b"], method="<b>", arch=odd, lr="{{ 1 }}"),
        write_run(tmp_path / "b" / "same", classes=[odd, "b"]),
        write_run(tmp_path / "c" / "same", classes=[odd, "b"]),
    ]
    text = write_report(folders, tmp_path / "out").read_text()
    parsed = Tables(text)
    assert "<script" not in text and "<b>" not in text
    names = {one["run"] for one in parsed.rows("best stage")}
    assert names == {"$\\frac{$", "<script>alert(1)<", str(tmp_path / "b" / "same"), str(tmp_path / "c" / "same")}
    assert {one["value"] for one in parsed.rows("setting") if one["setting"] == "classes"} == {f"{odd}, b"}
    assert "{{ 1 }}" in {one["lr"] for one in parsed.rows("lr")}
    png_size(draw_run(load_runs(folders[:1])))


def test_a_run_without_the_newer_keys_leaves_their_columns_and_panels_out(tmp_path):
    old = write_run(tmp_path / "old", without=(*NEW_KEYS, "seconds", "images_per_second"), alpha=0.5)
    new = write_run(tmp_path / "new")
    alone, both, whole = (tmp_path / name for name in ("alone", "both", "whole"))
    titles = Tables(write_report([old], alone).read_text()).rows("best stage")[0].keys()
    assert not titles & {"certificate", "training seconds", "images/s", "held for backward", "peak memory"}
    mixed = {one["run"]: one for one in Tables(write_report([old, new], both).read_text()).rows("best stage")}
    assert mixed["old"]["certificate"] == mixed["old"]["held for backward"] == "–"
    assert mixed["new"]["certificate"] == "62.50%"
    write_report([new], whole)
    sizes = [(folder / "report.png").stat().st_size for folder in (alone, both, whole)]
    assert sizes[0] < sizes[2] < sizes[1]  # fewer panels, and bars for two groups
    timed = write_run(tmp_path / "timed", without=("elapsed",))
    assert list(load_runs([timed]).epochs["elapsed"]) == [3.0, 6.0]  # summed from the epochs' seconds


def test_the_picture_of_one_run_shows_certificates_where_there_are_any(tmp_path):
    widths = {}
    for name, stages, without in (("new", 3, ()), ("old", 3, NEW_KEYS), ("plain", 1, ())):
        run = write_run(tmp_path / name, stages=stages, without=without)
        widths[name] = png_size(draw_run(load_runs([run])))[0]
    assert widths["new"] > widths["old"] == widths["plain"]


def test_many_runs_and_one_epoch_and_infinite_distances_are_drawn(tmp_path):
    folders = [
        write_run(tmp_path / f"{method}-{layout}-{noise}", (0.5,), 1 if method == "bp" else 3, method=method, layout=layout, label_noise=noise)
        for method in ("sid", "bp", "another") for layout in ("shared", "stagewise") for noise in (0.0, 0.2, 0.4)
    ]  # fmt: skip
    file = folders[0] / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.75", "Infinity"))
    page = write_report(folders, tmp_path / "out")
    assert len(Tables(page.read_text()).rows("best stage")) == 18
    png_size((tmp_path / "out" / "report.png").read_bytes())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", None, "No such file or directory"),
        ("config.json", None, "No such file or directory"),
        ("metrics.jsonl", "", "not a file of a run (it holds no complete epoch)"),
        ("metrics.jsonl", "{}\n", "not a file of a run ('epoch')"),
        ("metrics.jsonl", "[]\n", "not a file of a run"),
        ("metrics.jsonl", json.dumps(row(1, 0.5)) + '\n{"epoch": 2, "tr', "not a file of a run"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"stage_kl": 3}), "not a file of a run"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"stage_kl": None}), "not a file of a run"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"stage_kl": [1.0]}), "must be lists of one number per stage in every epoch"),
        ("metrics.jsonl", json.dumps(row(1, 0.5)) + "\n" + json.dumps(row(2, 0.5, 3)), "must be lists of one number per stage in every epoch"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"certificate": ["x", 1]}), "could not convert string to float: 'x'"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"elapsed": "long"}), "could not convert string to float: 'long'"),
        ("metrics.jsonl", json.dumps(row(1, 0.5) | {"test_accuracy": None}), "test_accuracy must be numbers in every epoch"),
        ("config.json", "[]", "not a file of a run"),
        ("config.json", "\xff\x00", "not a file of a run"),
        ("config.json", '{"alpha": 0.5, "classes": ["a"]}', "not a file of a run"),
        ("config.json", '{"method": "sid", "alpha": 0.5, "classes": []}', "classes a list"),
        ("config.json", '{"method": ["sid"], "alpha": 0.5, "classes": ["a"]}', "must be a name"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it_and_nothing_is_written(file, text, message, tmp_path):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    if text is None:
        (bad / file).unlink()
    else:
        (bad / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        write_report([good, bad], tmp_path / "out")
    assert str(error.value).startswith(f"{bad / file}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_no_folders(tmp_path):
    with pytest.raises(ValueError, match="folders must name at least one run"):
        write_report([], tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere.*No such file"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")


def test_a_folder_named_twice_is_one_run(tmp_path):
    run = write_run(tmp_path / "run")
    assert list(load_runs([run, tmp_path / "run" / ".." / "run"]).runs["name"]) == ["run"]


def pipeline(ranks=2):
    return {
        "ranks": [
            {
                "rank": rank, "stages": [2 * rank + 1, 2 * rank + 2], "busy": 1.5, "receiving": 0.25 * rank, "sending": 0.0,
                "reducing": 0.125, "bytes_sent": 2**20, "peak_memory_bytes": 2**28, "batches": [[0.1 * i + 0.05 * rank, 0.1 * i + 0.14] for i in range(9)],
            }
            for rank in range(ranks)
        ],
        "bubble": 0.125, "predicted_bubble": 0.1, "imbalance": 0.05,
    }  # fmt: skip


def test_a_run_over_ranks_adds_the_picture_of_its_pipeline(tmp_path):
    plain = write_run(tmp_path / "plain", stages=4, over_ranks=[1])  # the last epoch by one process
    (plain / "pipeline.json").write_text(json.dumps(pipeline()))
    two, four = (write_run(tmp_path / name, stages=4, over_ranks=[2]) for name in ("two $", "four"))
    (two / "pipeline.json").write_text(json.dumps(pipeline()))
    (four / "pipeline.json").write_text(json.dumps(pipeline(4)))
    heights = []
    for name, folders in (("a", [plain, two]), ("b", [plain, two, four])):
        parsed = Tables(write_report(folders, tmp_path / name).read_text())
        heights.append(png_size((tmp_path / name / "pipeline.png").read_bytes())[1])
    rows = parsed.rows("waited for batches")
    assert [(one["run"], one["rank"]) for one in rows] == [
        ("two $", "0"),
        ("two $", "1"),
        *(("four", str(r)) for r in range(4)),
    ]
    assert rows[1] == {
        "run": "two $", "rank": "1", "stages": "3, 4", "busy, seconds": "1.50", "waited for batches": "0.25",
        "waited for room": "0.00", "waited for replicas": "0.12", "sent on": "1 MiB", "peak memory": "256 MiB",
    }  # fmt: skip
    assert heights[0] < heights[1]
    assert sum(tag == "img" for tag, _ in parsed.tags) == 2
    write_report([plain], tmp_path / "c")
    assert not (tmp_path / "c" / "pipeline.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipeline: {}, "'ranks'"),
        (lambda pipeline: [], "not a file of a run"),
        (lambda pipeline: pipeline | {"ranks": []}, "it holds no rank"),
    ],
)  # fmt: skip
def test_a_pipeline_that_is_none_is_named(change, message, tmp_path):
    run = write_run(tmp_path / "run", over_ranks=[1, 2])
    (run / "pipeline.json").write_text(json.dumps(change(pipeline())))
    with pytest.raises(ValueError) as error:
        write_report([run], tmp_path / "out")
    assert str(error.value).startswith(f"{run / 'pipeline.json'}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
