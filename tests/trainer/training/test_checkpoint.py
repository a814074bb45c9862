"""Test checkpoints: damaged ones are refused and the previous one offered, none runs code, full disks lose nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from helpers.killed import assert_same, rows_of, state_of
from helpers.processes import forked
from sid_trainer import TrainConfig, Trainer, build_network
from sid_trainer.cli import main
from sid_trainer.data.datasets import ImageData, Split
from sid_trainer.files import write_atomically
from sid_trainer.methods.common import StepOptions
from sid_trainer.training import checkpoint
from sid_trainer.training.checkpoint import load_checkpoint, save_checkpoint
from sid_trainer.training.evaluation import evaluate
from sid_trainer.training.trainer import NonFiniteLoss

WORDS = "train --arch mlp --layout stagewise --depth 2 --hidden-dim 8 --train-images 100 --batch-size 50".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run of two epochs, whose previous.pt is from the end of the first."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    assert main([*WORDS, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(words, capsys):
    """Return the one line with which the command refuses."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err.strip()


def damage(file, position):
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 0x10
    file.write_bytes(content)


def test_a_flipped_byte_is_refused_and_the_one_before_offered_and_taken(run, finished, capsys):
    damage(run / "last.pt", 0.5)
    line = refused(["train", "--resume", run], capsys)
    assert line.startswith(f"sid train: error: {run / 'last.pt'}: damaged or not a checkpoint (checksum of ")
    offer = f"; {run / 'previous.pt'}, of epoch 2 step 0, is undamaged: resume from it instead"
    assert line.endswith(offer)
    for command in ("eval", "export"):
        assert refused([command, run], capsys).endswith(offer)
    assert main(["train", "--resume", str(run / "previous.pt")]) == 0
    assert "resumed in epoch 2 after step 0" in capsys.readouterr().out
    assert_same(state_of(run), state_of(finished))
    assert rows_of(run) == rows_of(finished)


def test_wherever_a_byte_is_flipped_the_file_is_refused_or_means_the_same(run, finished):
    """Flip bytes of an archive; a few of them, padding and dates, mean nothing."""
    whole, content, caught = load_checkpoint(finished), (run / "last.pt").read_bytes(), 0
    positions = [i / 60 for i in range(60)]
    positions += [1 - i / len(content) for i in range(1, 150, 3)]  # the end is the directory
    for position in positions:
        damage(run / "last.pt", position)
        try:
            assert_same(load_checkpoint(run), whole)
        except ValueError as error:
            assert "damaged or not a checkpoint" in str(error) and "\n" not in str(error)
            caught += 1
        (run / "last.pt").write_bytes(content)
    assert caught > 60


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_one_is_refused(run, share, capsys):
    size = (run / "last.pt").stat().st_size
    os.truncate(run / "last.pt", int(share * size))
    line = refused(["train", "--resume", run], capsys)
    assert f"{run / 'last.pt'}: damaged or not a checkpoint (File is not a zip file); {run / 'previous.pt'}, of" in line


def test_a_damaged_one_is_set_aside_and_never_takes_the_place_of_the_whole_one_before(run, monkeypatch):
    damage(run / "last.pt", 0.5)
    damaged, before = (run / "last.pt").read_bytes(), load_checkpoint(run / "previous.pt")
    replace = os.replace

    def killed_at_the_second(source, destination):
        if Path(destination).name == "last.pt":
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    assert main(["train", "--resume", str(run / "previous.pt")]) == 130
    assert_same(load_checkpoint(run), before)
    assert (run / "last.pt.replaced").read_bytes() == damaged


def test_with_both_damaged_nothing_is_offered(run, capsys):
    damage(run / "last.pt", 0.4)
    damage(run / "previous.pt", 0.6)
    line = refused(["train", "--resume", run], capsys)
    assert f"{run / 'last.pt'}: damaged or not a checkpoint" in line and "previous.pt" not in line
    line = refused(["train", "--resume", run / "previous.pt"], capsys)
    assert f"{run / 'previous.pt'}: damaged or not a checkpoint" in line and "resume from it" not in line


def test_what_is_no_checkpoint_is_named(run, tmp_path, capsys):
    assert refused(["train", "--resume", tmp_path / "no"], capsys).endswith(f"{tmp_path / 'no'}: no such file")
    assert f"{tmp_path}: holds no checkpoint (last.pt)" in refused(["train", "--resume", tmp_path], capsys)
    (run / "previous.pt").unlink()
    (run / "last.pt").write_text("words")
    assert "last.pt: damaged or not a checkpoint (File is not a zip file)" in refused(["eval", run], capsys)
    torch.save({"network": {}}, run / "last.pt")
    assert refused(["eval", run], capsys).endswith("last.pt: not a checkpoint of sid_trainer")
    torch.save(dict.fromkeys(checkpoint.FIELDS, {}), run / "last.pt")
    assert "was not saved by `sid train` of this version ('run')" in refused(["eval", run], capsys)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("as_archive", [True, False])
def test_a_file_from_elsewhere_runs_no_code(run, tmp_path, as_archive, capsys):
    touched = tmp_path / "touched"
    state = dict.fromkeys(checkpoint.FIELDS, {}) | {"network": Malicious(touched)}
    torch.save(state, run / "last.pt", _use_new_zipfile_serialization=as_archive)
    for words in (["train", "--resume", run], ["eval", run], ["export", run]):
        assert f"{run / 'last.pt'}: damaged or not a checkpoint" in refused(words, capsys)
    assert not touched.exists()
    torch.load(run / "last.pt", weights_only=False)
    assert touched.exists()  # otherwise it would have been harmless anyway


# ---------------------------------------------------------------- another network, other settings


def trainer(folder, *, depth=2, hidden_dim=8, buffers=None, **settings):
    images = torch.arange(16 * 16).to(torch.uint8).view(16, 4, 4, 1)
    split = Split(images, torch.arange(16) % 3)
    network = build_network(
        "mlp", "stagewise", num_classes=3, in_channels=1, image_size=(4, 4), depth=depth, hidden_dim=hidden_dim
    )
    for name, value in (buffers or {}).items():
        network.extractor.register_buffer(name, value)
    config = TrainConfig(**{"epochs": 2, "batch_size": 8, "device": "cpu"} | settings)
    return Trainer(network, ImageData(split, split, ["a", "b", "c"]), config, folder, quiet=True)


OTHERS = {
    "method": "greedy", "schedule": "two-phase", "fused": False, "epochs": 3, "batch_size": 4, "optimizer": "sgd",
    "lr": 0.5, "weight_decay": 0.5, "lr_schedule": "cosine", "alpha": 0.25, "label_smoothing": 0.1, "seed": 5,
    "dtype": "bfloat16", "channels_last": False,
}  # fmt: skip


def test_a_run_with_another_setting_is_refused_by_its_name(tmp_path):
    trainer(tmp_path).fit()
    for name, value in OTHERS.items():
        other = trainer(tmp_path, **{name: value})
        before = [p.clone() for p in other.network.parameters()]
        own = [value] * 2 if name == "alpha" else value
        with pytest.raises(ValueError, match=rf": saved by a run with {name} ") as error:
            other.resume()
        assert str(error.value).endswith(f"not {own!r}") and str(tmp_path) in str(error.value)
        assert all(torch.equal(a, b) for a, b in zip(before, other.network.parameters(), strict=True))
    same = trainer(tmp_path, save_every=1, workers=0)  # how it is run, not what
    same.resume()
    assert same.epoch == 3


@pytest.mark.parametrize(("network", "difference"), [
    ({"hidden_dim": 9}, "stages.0.head.hidden.weight is (8, 259) in the checkpoint and (9, 259) in the network"),
    ({"depth": 3, "alpha": [0.5] * 3}, "alpha [0.5, 0.5], not [0.5, 0.5, 0.5]"),
])  # fmt: skip
def test_another_network_is_refused_by_its_difference(tmp_path, network, difference):
    trainer(tmp_path).fit()
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, **network).resume()
    assert difference in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "where"), [
    ("stages.1.body.0.weight", "body.0.weight of stage 2"), ("extractor.kept", "extractor.kept"),
])  # fmt: skip
@pytest.mark.parametrize("save_every", [0, 1])
def test_a_network_that_is_not_finite_is_not_saved(tmp_path, name, where, save_every):
    """Check that such a network is not saved, although the loss before that update is finite."""
    trainer(tmp_path).save()
    before = (tmp_path / "last.pt").read_bytes()
    ours = trainer(tmp_path, save_every=save_every, buffers={"kept": torch.zeros(2), "mask": torch.tensor(-torch.inf)})
    whole = ours.strategy.step

    def step(*batch):
        result = whole(*batch)
        if save_every or ours.step == 1:  # the last of the first epoch
            ours.network.state_dict()[name].view(-1)[0] = float("nan")
        return result

    ours.strategy.step = step
    with pytest.raises(NonFiniteLoss) as error:
        ours.fit()
    place = f"{where} is not finite after epoch 1, step {1 if save_every else 2} (learning rate 0.001, float32)"
    assert str(error.value) == f"{place}; the last good checkpoint is kept"
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "previous.pt").exists()


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    """Use huge but finite weights: losses before the update are finite, and the next logits are not."""
    trainer(tmp_path).save()
    ours = trainer(tmp_path)
    whole = ours.strategy.step

    def step(*batch):
        result = whole(*batch)
        if ours.step == 1:  # the last of the first epoch
            with torch.no_grad():
                for parameter in ours.network.stages[1].parameters():
                    parameter.fill_(1e30)
        return result

    ours.strategy.step = step
    with pytest.raises(
        NonFiniteLoss, match="stage 2 is not finite on the test images after epoch 1 .*checkpoint is kept"
    ):
        ours.fit()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    ours.network.eval()
    with pytest.raises(ValueError, match="the logits of stage 2 are not finite"):
        evaluate(ours.network, ours.strategy.batches["test"].in_order(), StepOptions())


# ---------------------------------------------------------------- a full disk, a kill between two renames

LIMITED = (
    "import resource, sys; from sid_trainer.cli import main\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
    "sys.exit(main(sys.argv[2:]))"
)


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_what_was_saved(run, finished, capsys):
    """Let the system refuse to let a file grow after a part of the checkpoint was written."""
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.suffix in (".pt", ".json", ".jsonl")}
    size = (run / "last.pt").stat().st_size
    resume = ["train", "--resume", str(run / "previous.pt")]
    limited = forked(LIMITED, size // 2, *resume)
    assert limited.returncode == 2
    assert limited.stderr == f"sid train: error: [Errno 27] File too large: '{run / 'last.pt'}'\n"
    after = {file.name: file.read_bytes() for file in run.iterdir() if file.suffix in (".pt", ".json", ".jsonl")}
    assert (run / "last.pt.replaced").read_bytes() == before.pop("last.pt")
    changed = {name for name in before if after[name] != before[name]}
    assert before.keys() == after.keys() and changed <= {"metrics.jsonl"}  # one row less: from previous.pt
    assert not list(run.glob(".last.pt*"))
    assert main(resume) == 0
    assert_same(state_of(run), state_of(finished))
    assert rows_of(run) == rows_of(finished)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_no_space_left_names_the_file_and_keeps_the_checkpoint(tmp_path, monkeypatch, failing):
    full = OSError(errno.ENOSPC, "No space left on device")
    ours = trainer(tmp_path)
    ours.fit()
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "previous.pt")}

    def raising(*args, **options):
        raise full

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", raising)
    else:
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda state, file: save(state, FullDisk(file, 1000, full)))
    with pytest.raises(OSError) as error:
        ours.save()
    assert str(error.value) == f"[Errno {errno.ENOSPC}] No space left on device: '{tmp_path / 'last.pt'}'"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob(".last.pt*"))


class FullDisk:
    """A file that takes a limited number of bytes."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise self.error
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused([*WORDS, "--epochs", "1", "--out", tmp_path / "file" / "run"], capsys)
    assert line.startswith(f"sid train: error: [Errno 20] Not a directory: '{tmp_path / 'file' / 'run'}")


def test_between_the_two_renames_the_one_before_is_there_and_used(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    ours.fit()
    last, replace = load_checkpoint(tmp_path), os.replace

    def killed_at_the_second(source, destination):
        if Path(destination).name == "last.pt":
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ours.save()
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["previous.pt"]
    again = trainer(tmp_path)
    again.resume()
    assert again.epoch == 3
    again.save()
    assert_same(load_checkpoint(tmp_path), last)


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "file"

    def half(out):
        out.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert os.listdir(tmp_path) == []
    write_atomically(file, lambda out: out.write(b"whole"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert os.listdir(tmp_path) == ["file"] and file.read_bytes() == b"whole"
    umask = os.umask(0o027)
    try:
        write_atomically(file, lambda out: out.write(b"again"))
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = dict.fromkeys(checkpoint.FIELDS) | {"network": {"a": torch.randn(3), "b": torch.arange(2)}, "epoch": 7}
    save_checkpoint(tmp_path, state)
    assert_same(load_checkpoint(tmp_path), state)
    save_checkpoint(tmp_path, state | {"epoch": 8})
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in ("previous.pt", "last.pt")] == [7, 8]
