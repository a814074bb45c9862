"""Test the `sid` command and the Trainer end to end: the files of a run, and the message for each mistake."""

import json
import os
import signal
import sys

import pytest
import torch

from helpers.image_sets import write_image_folder, write_mnist
from helpers.processes import forked
from sid_trainer import TrainConfig, Trainer, build_network
from sid_trainer.cli import find_dataset, main
from sid_trainer.data.datasets import ImageData, Split
from sid_trainer.runs.build import load_network
from sid_trainer.training.checkpoint import load_checkpoint
from sid_trainer.training.config import run_config, stage_alphas

KEYS = {
    "epoch", "step", "lr", "train_loss", "train_accuracy", "stage_loss", "test_accuracy", "stage_accuracy", "stage_kl",
    "certificate", "images_per_second", "seconds", "elapsed", "activation_bytes", "peak_memory_bytes",
}  # fmt: skip
TIMES = {
    "images_per_second",
    "seconds",
    "elapsed",
    "peak_memory_bytes",
}  # these differ between two runs with equal bits


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read(folder)]


def check_run(folder, epochs, depth, optimizers):
    rows = read(folder)
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    for row in rows:
        assert KEYS <= row.keys()
        assert len(row["stage_accuracy"]) == len(row["stage_kl"]) == len(row["certificate"]) == depth
        assert row["test_accuracy"] == row["stage_accuracy"][-1]
    assert (folder / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["depth"] == depth
    state = load_checkpoint(folder)
    assert (state["epoch"], state["step"], len(state["optimizers"])) == (epochs + 1, 0, optimizers)
    network, run, about = load_network(folder)
    beliefs = network.beliefs(torch.zeros(2, about["in_channels"], *about["image_size"]))
    assert beliefs.shape == (depth, 2, len(about["classes"])) and run.epochs == epochs
    return rows


def test_digits_end_to_end(tmp_path, capsys):
    out = tmp_path / "run"
    status = main(["train", "--epochs", "3", "--batch-size", "16", "--depth", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    rows = check_run(out, 3, 4, optimizers=2)  # one for the extractor, one for the stacked heads
    assert rows[-1]["test_accuracy"] > 0.92
    assert rows[-1]["stage_kl"][-1] < rows[-1]["stage_kl"][0]  # later beliefs are closer to the labels
    assert "stage   accuracy   KL(y|p)   certificate   after epoch 3" in printed and str(out / "stages.png") in printed
    assert main(["eval", str(out)]) == 0
    table = capsys.readouterr().out
    assert "on 360 test images" in table and f"{rows[-1]['test_accuracy']:.2%}" in table.splitlines()[-1]


def test_image_folder_end_to_end_in_bfloat16(tmp_path):
    data = write_image_folder(tmp_path / "set", count=24)
    where = ["--dataset", "folder", "--data", str(data), "--cache", str(tmp_path / "cache")]
    out = tmp_path / "run"
    options = ["--epochs", "8", "--depth", "2", "--batch-size", "8", "--dtype", "bfloat16", "--out", str(out)]
    assert main(["train", *where, *options]) == 0
    rows = check_run(out, 8, 2, optimizers=2)
    assert rows[-1]["test_accuracy"] > 0.9
    assert json.loads((out / "config.json").read_text())["classes"] == ["a", "b c"]


@pytest.mark.parametrize(
    ("words", "depth", "optimizers"),
    [
        pytest.param("--depth 3", 3, 2, marks=pytest.mark.slow),
        ("--depth 3 --schedule two-phase --alpha 0.9:0.3", 3, 4),
        ("--depth 3 --schedule reference --channels-last", 3, 1),
        ("--depth 3 --method deep-supervision --no-channels-last", 3, 1),
        ("--layout stagewise --arch mlp --depth 2 --optimizer sgd --label-smoothing 0.1 --divergence reverse", 2, 3),
        ("--layout stagewise --arch vgg11 --train-images 50 --val 0.2 --label-noise 0.2", 5, 6),
        ("--layout stagewise --method bp-checkpoint", 1, 1),
    ],
)
def test_mnist_files_by_methods_networks_and_options(tmp_path, words, depth, optimizers):
    """Train on files of MNIST; `optimizers` counts the None of an extractor without parameters."""
    data = write_mnist(tmp_path / "data")
    out = tmp_path / "run"
    options = ["--epochs", "1", "--batch-size", "24", *words.split(), "--out", str(out)]
    assert main(["train", "--dataset", "mnist", "--data", str(data), *options]) == 0
    rows = check_run(out, 1, depth, optimizers)
    assert ("val_accuracy" in rows[0]) == ("--val" in words)


@pytest.mark.usefixtures("blank_pictures")
def test_the_seed_determines_every_bit(tmp_path):
    actual = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        options = ["--epochs", "2", "--depth", "3", "--crop", "1", "--seed", str(seed)]
        options += ["--batch-size", "100", "--train-images", "400"]
        assert main(["train", *options, "--out", str(out)]) == 0
        actual.append(without_times(out))
    assert actual[0] == actual[1] != actual[2]


def run_and_read(arguments, capsys):
    status = main(arguments)
    return status, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: train | compare | report | eval | export"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--wrong"], "unrecognized arguments: --wrong"),
        (["train", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "epochs must be at least 1, not 0"),
        (
            ["train", "--arch", "resnet18", "--train-images", "10", "--batch-size", "1", "--out", "run"],
            "batch_size 1 leaves a process a single image to train on, which is too few for batch-norm",
        ),
        (["train", "--batch-size", "-1"], "batch_size must be at least 1, not -1"),
        (["train", "--alpha", "1.5"], "alpha must be a number in [0, 1], FIRST:LAST, or one number per stage"),
        (["train", "--alpha", "0.5,0.4,0.3"], "alpha must be one number or one for each of the 10 stages, not 3"),
        (["train", "--lr", "nan"], "lr must be a positive number, not nan"),
        (["train", "--seed", "-3"], "seed must be at least 0, not -3"),
        (["train", "--depth", "0"], "depth must be at least 1, not 0"),
        (["train", "--crop", "-2"], "crop must be at least 0, not -2"),
        (["train", "--flip"], "a mirrored digit is not that digit"),
        (["train", "--arch", "lenet"], "invalid choice: 'lenet'"),
        (["train", "--arch", "vgg11", "--layout", "stagewise", "--depth", "4"], "depth must be 5 for a stagewise"),
        (["train", "--layout", "ring"], "invalid choice: 'ring'"),
        (["train", "--divergence", "reverse"], "needs label_smoothing above 0"),
        (["train", "--label-noise", "2"], "label_noise must be in [0, 1], not 2.0"),
        (["train", "--val", "1"], "val must be in [0, 1), not 1.0"),
        (["train", "--train-images", "0"], "train_images must be at least 1, not 0"),
        (["train", "--train-images", "1438"], "training images must be 1 to 1437, not 1438"),
        (["train", "--method", "magic"], "invalid choice: 'magic'"),
        (["train", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["train", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["train", "--dataset", "svhn"], "invalid choice: 'svhn'"),
        (["train", "--dataset", "digits", "--data", "somewhere"], "data must not be given for digits"),
        (["train", "--data", "nowhere-at-all"], "nowhere-at-all: no such folder"),
        (["train", "--dataset", "folder"], "path must be the folder of the data set 'folder'"),
        (["train", "--dataset", "folder", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "--dataset", "mnist", "--data", "."], "the MNIST files could not be read (Dataset not found"),
        (["train", "--out", "file/run"], "Not a directory"),
        (["train", "--resume", "empty"], "empty: holds no checkpoint (last.pt)"),
        (["train", "--resume", "file"], "file: damaged or not a checkpoint"),
        (["train", "--resume", "nowhere"], "nowhere: no such file"),
        (["train", "--resume", "empty", "--lr", "1"], "--lr cannot be given with --resume: the run keeps its settings"),
        (["eval", "empty"], "empty: holds no checkpoint (last.pt)"),
        (["export", "nowhere"], "nowhere: no such file"),
        (["compare"], "the following arguments are required: --out"),
        (["report", "nowhere"], "No such file or directory"),
        (["report", "damaged"], "not a file of a run"),
        (["report", "empty"], "holds no complete epoch"),
    ],
)
def test_mistakes_give_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, text in (("damaged", "{"), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        (tmp_path / name / "config.json").write_text("{}")
    status, printed = run_and_read(arguments, capsys)
    assert status == 2
    assert printed.startswith("sid") and message in printed and "\n" not in printed, printed


@pytest.mark.parametrize(("entries", "name"), [
    (["MNIST"], "mnist"), (["FashionMNIST"], "fashion-mnist"), (["cifar-10-batches-py"], "cifar10"),
    (["cifar-100-python"], "cifar100"), (["train", "val", "wnids.txt"], "tiny-imagenet"), (["train", "val"], "folder"),
    (["train", "MNIST"], "folder"), ([], "folder"), (["a.txt"], "text"), (["train", "README.txt"], "folder"),
])  # fmt: skip
def test_find_dataset_by_the_content_of_its_folder(tmp_path, entries, name):
    for entry in entries:
        (tmp_path / entry).mkdir()
    assert find_dataset(str(tmp_path)) == name


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, printed = run_and_read(["train", "--out", str(tmp_path / "run")], capsys)
    line = "sid train: error: 'sklearn.datasets' cannot be imported; install it: pip install -e \".[trainer]\""
    assert (status, printed) == (2, line) and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("blank_pictures")
def test_only_overwrite_replaces_a_run(tmp_path, capsys):
    arguments = ["train", "--epochs", "1", "--depth", "1", "--train-images", "100", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = read(tmp_path / "run")
    status, printed = run_and_read(arguments, capsys)
    assert status == 2 and "holds a run already; choose another --out, --resume it, or give --overwrite" in printed
    assert read(tmp_path / "run") == before
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.usefixtures("blank_pictures")
def test_a_single_image_left_over_does_not_stop_batch_norm(tmp_path):
    words = "train --arch vgg11 --layout stagewise --batch-size 4 --train-images 9 --epochs 1".split()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    (row,) = read(tmp_path / "run")
    assert row["step"] == 2


def test_help_and_module_entry():
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["compare", "--help"],
    ):
        assert main(arguments) == 0
    wrong = forked("import runpy; runpy.run_module('sid_trainer', run_name='__main__')", "train", "--no")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_an_infinite_loss_stops_the_run_and_names_stage_and_step(tmp_path, capsys):
    arguments = ["train", "--lr", "1e30", "--epochs", "3", "--depth", "2", "--out", str(tmp_path / "run")]
    status, printed = run_and_read(arguments, capsys)
    assert status == 1
    assert "the loss of stage 1 is " in printed and "in epoch 1, step 2 " in printed and "\n" not in printed


def test_out_of_memory_gives_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")

    monkeypatch.setattr(Trainer, "train_step", full)
    status, printed = run_and_read(["train", "--out", str(tmp_path / "run")], capsys)
    assert status == 1 and printed == "sid train: CUDA out of memory. Tried to allocate 2 GiB."


@pytest.mark.parametrize("layout", ["shared", "stagewise"])
def test_too_small_images_give_one_line(tmp_path, capsys, layout):
    data = write_image_folder(tmp_path / "set")
    words = ["train", "--data", str(data), "--cache", str(tmp_path / "cache"), "--image-size", "2", "--layout", layout]
    status, printed = run_and_read(words, capsys)
    line = "sid train: error: image_size must be at least 4x4 for simple_cnn, which pools twice, not 2x2"
    assert (status, printed) == (2, line)


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_resumed_to_the_same_bits(tmp_path, monkeypatch, capsys, number):
    options = ["--epochs", "2", "--depth", "2", "--crop", "1", "--train-images", "200", "--batch-size", "40"]
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    calls, one_step = [], Trainer.train_step

    def interrupted_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return one_step(*arguments)

    before = signal.getsignal(number)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted_at_the_third)
        status, printed = run_and_read(["train", *options, "--out", str(out)], capsys)
    assert status == 130 and "stopped in epoch 1 after step 3" in printed and "Traceback" not in printed
    assert signal.getsignal(number) is before
    state = load_checkpoint(out)
    assert (state["epoch"], state["step"]) == (1, 3)
    assert main(["train", "--resume", str(out)]) == 0
    assert "resumed in epoch 1 after step 3" in capsys.readouterr().out
    assert without_times(out) == without_times(tmp_path / "whole")
    ends = [load_checkpoint(folder)["network"] for folder in (out, tmp_path / "whole")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def small_trainer(**settings):
    images = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 3)
    network = build_network(num_classes=3, in_channels=1, depth=2)
    config = TrainConfig(epochs=2, batch_size=8, channels_last=False, **settings)
    return Trainer(network, ImageData(split, split, ["a", "b", "c"]), config, quiet=True)


@pytest.mark.parametrize("lr_schedule", ["cosine", "one-cycle"])
def test_rows_hold_the_learning_rate_of_the_last_step(lr_schedule):
    trainer, used = small_trainer(lr_schedule=lr_schedule), []
    trainer.strategy.optimizers[-1].register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    assert [row["lr"] for row in trainer.fit()] == [used[2], used[5]] and used[5] > 0


def test_alpha_as_text_in_python():
    """Check that alpha is read as on the command line: linear over depth, or one number per stage."""
    assert small_trainer(alpha="0.9:0.3").metadata["alpha"] == pytest.approx([0.9, 0.3])
    assert small_trainer(alpha="0.8,0.4").metadata["alpha"] == [0.8, 0.4]
    with pytest.raises(ValueError, match="alpha must be one number or one for each of the 2 stages, not 3"):
        small_trainer(alpha=(0.1, 0.2, 0.3))


def test_graded_label_smoothing():
    """Check that it is what remains of the uniform belief at each stage of an ideal cascade with alpha 1/2."""
    smoothing = small_trainer(label_smoothing="graded").metadata["label_smoothing"]
    assert smoothing == [0.5, 0.25]
    with pytest.raises(ValueError, match="label_smoothing must be a number for one stage, not 'graded'"):
        stage_alphas(run_config(arch="mlp", layout="stagewise", method="bp", label_smoothing="graded"))
    with pytest.raises(ValueError, match=r"FIRST:LAST, graded, or one number per stage .*, not 'grade'"):
        TrainConfig(label_smoothing="grade")
    with pytest.raises(ValueError, match="alpha must be a number in .*, not 'graded'"):
        TrainConfig(alpha="graded")


def test_the_trainer_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer()
    rows = trainer.fit()
    assert rows is trainer.metrics and len(rows) == 2 and os.listdir(tmp_path) == []


def test_importing_needs_only_torch_and_numpy():
    """Check that libraries for pictures, images and progress bars are imported only when they are used."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'sklearn', 'torchvision', 'tqdm', 'PIL']));"
        "from sid_trainer import build_network, sid_step, Trainer; import sid_trainer.cli"
    )
    assert forked(code).stderr == ""
