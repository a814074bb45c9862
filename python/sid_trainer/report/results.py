"""Read run folders as tables with a row per run, epoch, stage, or group of runs that differ in the seed only."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..files import CONFIG, METRICS, PIPELINE, nonempty_path

METHODS = ("sid", "greedy", "deep-supervision", "bp", "bp-checkpoint", "bp-accumulate")  # their order in the report
FAMILY = ["arch", "layout", "label_noise", "method"]  # settings with a column of their own
# Settings in which runs of one group may differ: the seed, how the run was started, where its files are.
NOT_SETTINGS = {
    "seed", "run", "threads", "launch", "data", "cache", "download", "workers", "save_every", "parallel", "replicas",
    "stages_per_rank", "in_flight", "timeout",
}  # fmt: skip
DERIVED = {  # from other settings
    "num_parameters", "operations", "classes", "in_channels", "pixel_mean", "pixel_std", "unit", "bytes_per_token",
    "tokenizer",
}  # fmt: skip
NUMBERS = ["epoch", "train_loss", "test_accuracy"]
SPEEDS = ["images_per_second", "tokens_per_second"]  # a run has one of them
OPTIONAL = ["elapsed", "seconds", *SPEEDS, "activation_bytes", "peak_memory_bytes"]  # older runs lack them
LISTS = ["stage_accuracy", "stage_kl", "certificate"]  # one number per stage; the last is optional


class Results(NamedTuple):
    """The content of run folders, as tables with the columns run, group, method and variant.

    runs: A row per run, in the order of the report: name, config, settings (those that tell its group from others of
        the same FAMILY, as text), and results.
    epochs: A row per run and epoch: NUMBERS and OPTIONAL.
    stages: A row per run, epoch and stage (from 1): LISTS, and whether this is the run's last epoch.
    pipelines: The content of pipeline.json by run, for runs whose stages were spread over ranks.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    stages: pd.DataFrame
    pipelines: dict[int, dict[str, Any]]


def load_runs(folders: Sequence[Path | str]) -> Results:
    """Read run folders, each once. Raises ValueError with one line that names the file if one holds no run."""
    paths = list({Path(folder).resolve(): nonempty_path(folder, "folders") for folder in folders}.values())
    if not paths:
        raise ValueError("folders must name at least one run, not none")
    names = [path.resolve().name for path in paths]
    tables = [[table.assign(run=run) for table in read_metrics(path / METRICS)] for run, path in enumerate(paths)]
    configs = [read_config(path / CONFIG) for path in paths]
    epochs, stages = (pd.concat(table, ignore_index=True) for table in zip(*tables, strict=True))
    has_pipeline = epochs.groupby("run")["pipeline"].last()  # otherwise the file is of an earlier epoch
    files = {run: path / PIPELINE for run, path in enumerate(paths) if has_pipeline[run] and (path / PIPELINE).exists()}
    pipelines = {run: read_pipeline(file) for run, file in files.items()}
    runs = epochs.groupby("run").agg(
        epoch=("epoch", "last"), test_accuracy=("test_accuracy", "last"), elapsed=("elapsed", "last"),
        **{name: (name, "median") for name in SPEEDS}, activation_bytes=("activation_bytes", "max"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
    ).join(stages[stages["last"]].groupby("run").agg(
        stages=("stage", "size"), best_stage=("stage_accuracy", "max"), first_stage=("stage_accuracy", "first"),
        last_kl=("stage_kl", "last"), certificate=("certificate", "mean"),
    ))  # fmt: skip
    runs["certificate"] = runs["certificate"].where(runs["stages"] > 1)  # one stage has no earlier one to improve on
    runs["name"] = [to_text(n if names.count(n) == 1 else str(path)) for n, path in zip(names, paths, strict=True)]
    runs = add_settings(runs.assign(config=configs))
    kind = runs[["group", "method", "variant"]]
    return Results(runs, epochs.join(kind, on="run"), stages.join(kind, on="run"), pipelines)


def add_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that come from `config`, and order the runs by architecture, layout, noise, method and seed."""
    for key in ("arch", "layout", "method", "seed"):
        runs[key] = [config.get(key) for config in runs["config"]]
    runs["label_noise"] = [config.get("label_noise") or 0.0 for config in runs["config"]]
    exact = settings_of(runs, json.dumps).drop(columns="seed", errors="ignore")
    runs["group"] = exact.assign(stages=runs["stages"]).groupby(list(exact) + ["stages"], sort=False).ngroup()
    configs = dict(zip(runs.index, runs["config"], strict=True))
    for _, family in exact.groupby([runs[key] for key in FAMILY], dropna=False):
        named = [key for key in exact if key not in DERIVED and family[key].nunique() > 1]
        for run in family.index:
            text = (f"{key} {to_text(configs[run].get(key))}" for key in named)
            runs.loc[run, "settings"] = ", ".join(text)
    runs["place"] = [METHODS.index(m) if m in METHODS else len(METHODS) for m in runs["method"]]
    runs["number"] = pd.to_numeric(runs["seed"], errors="coerce")
    runs = runs.sort_values(["arch", "layout", "label_noise", "place", "method", "group", "number"])
    runs["group"] = pd.factorize(runs["group"])[0]
    words = runs[["arch", "layout", "settings"]].fillna("").assign(noise=runs["label_noise"].map("noise {:.0%}".format))
    differing = words.loc[:, words.nunique() > 1].to_numpy()
    runs["variant"] = [" · ".join(filter(None, row)).replace("$", r"\$") for row in differing]  # $ starts a formula
    return runs


def settings_of(runs: pd.DataFrame, text: Callable[[Any], str]) -> pd.DataFrame:
    """Return the settings of each run, including the seed, each converted to text by `text`."""
    keys = dict.fromkeys(key for config in runs["config"] for key in config if key == "seed" or key not in NOT_SETTINGS)
    return pd.DataFrame({key: [text(config.get(key)) for config in runs["config"]] for key in keys}, index=runs.index)


def comparison_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per group of runs: FAMILY, settings, number n of runs, seeds, epochs reached, and results.

    test_accuracy is the mean over runs after their last epoch, in [0, 1]; deviation is the standard deviation of this
    sample (NaN for one run). SPEEDS are medians; activation_bytes and peak_memory_bytes are the largest.
    """
    return runs.groupby("group").agg(
        **{key: (key, "first") for key in ["arch", "layout", "method", "label_noise", "settings"]},
        n=("name", "size"), seeds=("seed", list), epochs=("epoch", lambda epochs: sorted(set(epochs))),
        test_accuracy=("test_accuracy", "mean"), deviation=("test_accuracy", "std"),
        **{name: (name, "median") for name in SPEEDS}, activation_bytes=("activation_bytes", "max"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
    )  # fmt: skip


# ---------------------------------------------------------------- files


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise a ValueError of one line that names the file, instead of any error in reading or interpreting it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a file of a run ({' '.join(str(error).split())})") from error


def read_metrics(file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the epochs and the stages of metrics.jsonl."""
    with reading(file):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise ValueError("it holds no complete epoch")
        columns = {key: [row[key] for row in rows] for key in NUMBERS}
        columns |= {key: [row.get(key) for row in rows] for key in OPTIONAL}
        epochs = pd.DataFrame(columns, dtype=float)
        if epochs[NUMBERS].isna().any(axis=None):
            raise ValueError(f"{', '.join(NUMBERS)} must be numbers in every epoch")
        depth = len(rows[0]["stage_kl"])
        lists = [[row.get(key) or [math.nan] * (depth if key == "certificate" else 0) for key in LISTS] for row in rows]
        if {np.shape(values) for epoch_lists in lists for values in epoch_lists} != {(depth,)}:
            raise ValueError(f"{', '.join(LISTS)} must be lists of one number per stage in every epoch")
        stages = pd.DataFrame(np.array(lists, float).transpose(0, 2, 1).reshape(-1, len(LISTS)), columns=LISTS)
    epochs["elapsed"] = epochs["elapsed"].fillna(epochs["seconds"].cumsum())
    epochs["pipeline"] = ["pipeline" in row for row in rows]
    stages["epoch"] = np.repeat(epochs["epoch"].to_numpy(), depth)
    stages["stage"] = np.tile(range(1, depth + 1), len(rows))
    stages["last"] = stages["epoch"] == epochs["epoch"].max()
    return epochs, stages


def read_config(file: Path) -> dict[str, Any]:
    """Return the settings in config.json, after checking that it has those that the report needs."""
    with reading(file):
        config = json.loads(file.read_text(encoding="utf-8"))
        if not config["classes"] or not isinstance(config["method"], str):
            raise ValueError("method must be a name, classes a list")
    return config


def read_pipeline(file: Path) -> dict[str, Any]:
    """Return the content of pipeline.json: idle shares of the last epoch and the times of each rank.

    Each of `ranks` has its numbers, its stages (from 1) and its first `batches`, [start, end] in seconds.
    """
    with reading(file):
        pipeline = json.loads(file.read_text(encoding="utf-8"))
        if not pipeline["ranks"]:
            raise ValueError("it holds no rank")
    return pipeline


def to_text(value: Any) -> str:
    """Format a setting as short text; a list of equal values, one per stage, becomes one value."""
    if isinstance(value, list):
        parts = [to_text(part) for part in value]
        text = parts[0] if parts and set(parts) == {parts[0]} else ", ".join(parts)
        return text if len(text) <= 60 else f"{text[:60]}… ({len(value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.encode(errors="replace").decode()  # a file's name need not be Unicode
