"""Freeze the list of flags of `sid`, and check that empty paths and missing packages give one line."""

import argparse
from dataclasses import fields

import pytest

from helpers.processes import forked
from sid_trainer import TrainConfig, Trainer, build_network, load_data
from sid_trainer.cli import main
from sid_trainer.options import make_parser
from sid_trainer.report.results import load_runs
from sid_trainer.training.config import RunConfig

SETTINGS = (
    "alpha arch batch-size cache channels-last classifier crop data dataset depth device divergence download dtype epochs flip fused"
    " graph grid head-depth hidden-dim image-size in-flight label-noise label-smoothing lr lr-schedule network norm"
    " optimizer parallel prior-dropout prior-input"
    " attention-heads context layers readout readout-refresh tokens vocabulary width"
    " replicas save-every schedule stages-per-rank stream streams tail timeout train-images val weight-decay workers"
)
SWITCHES = "channels-last download flip fused graph norm prior-input stream streams"  # each also has a --no-... flag
FLAGS = {
    "train": f"{SETTINGS} layout method out overwrite resume seed",
    "compare": f"{SETTINGS} layouts methods out seeds",
    "report": "out",
    "eval": "cache data exit",
    "export": "format out plain",
    "sample": "exit prompt seed temperature tokens",
}
TRAINER_PACKAGES = [
    "jinja2",
    "matplotlib",
    "pandas",
    "seaborn",
    "sklearn",
    "tensorboard",
    "torchvision",
    "tqdm",
]


def parsers():
    (commands,) = (
        action
        for action in make_parser(dict.fromkeys(FLAGS, print))._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return commands.choices


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(command):
    actual = {flag for action in parsers()[command]._actions for flag in action.option_strings} - {"-h", "--help"}
    negations = SWITCHES.split() if command in ("train", "compare") else []
    assert sorted(actual) == sorted(
        [f"--{name}" for name in FLAGS[command].split()] + [f"--no-{name}" for name in negations]
    )


def test_every_setting_has_a_flag_and_shows_its_default():
    flags = {action.dest: action.help for action in parsers()["train"]._actions}
    for setting in fields(RunConfig):
        assert "(default: " in flags[setting.name] or setting.name in ("data", "network"), setting.name
    assert "(default: 256)" in flags["hidden_dim"] and "(default: yes)" in flags["streams"]


def test_settings_that_are_not_given_are_absent():
    """Check that settings not given are absent: the recipe fills them in, and `--resume` tells which were given."""
    args = make_parser(dict.fromkeys(FLAGS, print)).parse_args(["train", "--lr", "0.5", "--stages-per-rank", "1", "2"])
    assert vars(args) == {"command": "train", "run": print, "lr": 0.5, "stages_per_rank": [1, 2]}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --out", "sid train: error: argument --out: must not be empty"),
        ("train --resume", "sid train: error: argument --resume: must not be empty"),
        ("train --data", "sid train: error: data must not be empty"),
        ("train --dataset folder --data", "sid train: error: data must not be empty"),
        ("train --cache", "sid train: error: cache must not be empty"),
        ("train --device", "sid train: error: device must not be empty"),
        ("compare --out", "sid compare: error: argument --out: must not be empty"),
        ("compare --out x --data", "sid compare: error: data must not be empty"),
        ("report", "sid report: error: argument RUN: must not be empty"),
        ("report x --out", "sid report: error: argument --out: must not be empty"),
        ("eval", "sid eval: error: argument RUN: must not be empty"),
        ("export x --out", "sid export: error: argument --out: must not be empty"),
    ],
)
def test_empty_paths_are_refused(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words.split(), ""]) == 2
    assert capsys.readouterr().err == line + "\n" and not list(tmp_path.iterdir())


def test_empty_paths_are_refused_in_python():
    for call, name in (
        (lambda: RunConfig(dataset="folder", data=""), "data"),
        (lambda: load_data("folder", ""), "path"),
        (lambda: load_data("digits", cache=""), "cache"),
        (lambda: Trainer(build_network(depth=1), None, TrainConfig(), ""), "folder"),
        (lambda: load_runs([""]), "folders"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must not be empty$"):
            call()


@pytest.mark.parametrize("words", ["train --out x", "compare --out x", "report x"])
def test_missing_dependencies_give_one_line(words, tmp_path):
    block = f"import sys; sys.modules.update(dict.fromkeys({TRAINER_PACKAGES}));"
    code = block + "from sid_trainer.cli import main; sys.exit(main(sys.argv[1:]))"
    run = forked(code, *words.split(), cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and not list(tmp_path.iterdir())
    assert run.stderr.count("\n") == 1 and run.stderr.endswith('install it: pip install -e ".[trainer]"\n')
