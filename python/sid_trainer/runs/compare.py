"""A comparison: every method with every seed under one budget, then a table of means and deviations."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from ..files import METRICS, write_atomically
from ..report.page import as_markdown, comparison_text, write_report
from ..report.results import comparison_table, load_runs
from ..training.checkpoint import has_checkpoint
from ..training.config import MOVABLE, RunConfig, stage_alphas
from .build import make_trainer, resume_run, saved_run

TABLE = "table"


def compare_methods(
    base: RunConfig, out: Path, *, methods: Sequence[str], layouts: Sequence[str], seeds: Sequence[int],
    label_noises: Sequence[float] = (0.0,), command: str = "",
) -> str:  # fmt: skip
    """Train every combination of methods, layouts, seeds and label noises on the settings `base`; return the table.

    Each run has a folder of its own in `out`; table.json, table.md and the report are written there too. Finished runs
    are taken as they are and others are resumed, so a comparison that was stopped continues, and parts of it may run at
    the same time.

    Raises ValueError, before anything is trained, if a run in `out` has other settings.
    """
    if base.parallel != "none":
        raise ValueError(f"parallel {base.parallel!r} is for one run; a comparison makes many, each in one process")
    cells = []
    for noise, layout, method, seed in product(label_noises, layouts, methods, seeds):
        name = f"{layout}-{method}" + (f"-noise{noise:g}" if noise else "") + f"-seed{seed}"
        run = dataclasses.replace(base, method=method, layout=layout, seed=seed, label_noise=noise)
        cells.append((out / name, run))
    for folder, run in cells:
        stage_alphas(run)  # raises ValueError for alphas that do not fit the layout
        check_settings(folder, run)
    for i, (folder, run) in enumerate(cells, 1):
        if epochs_done(folder) < run.epochs:
            print(f"\n[{i}/{len(cells)}] {folder.name}", flush=True)
            moved = {name: getattr(run, name) for name in MOVABLE}
            (resume_run(folder, **moved) if has_checkpoint(folder) else make_trainer(run, folder)).fit()
    return write_table([folder for folder, _ in cells], out, command)


def check_settings(folder: Path, run: RunConfig) -> None:
    """Raise ValueError if a checkpoint in the folder is of a run with other settings."""
    if not has_checkpoint(folder):
        return
    saved, _ = saved_run(folder)  # settings that did not exist yet have their defaults
    for name, value in dataclasses.asdict(run).items():
        if getattr(saved, name) != value and name not in MOVABLE:
            raise ValueError(
                f"{folder}: was run with {name} {getattr(saved, name)!r}, not {value!r}; choose another --out"
            )


def epochs_done(folder: Path) -> int:
    metrics = folder / METRICS
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def write_table(folders: Sequence[Path], out: Path, command: str = "") -> str:
    """Write the comparison of the runs in `folders` as table.json and table.md, and the report; return the table."""
    runs = load_runs(folders).runs
    text = as_markdown(comparison_text(runs))
    table = json.loads(comparison_table(runs).to_json(orient="records", double_precision=15))
    record = {"command": command, "settings": common_settings(list(runs["config"])), "table": table}
    write_atomically(out / f"{TABLE}.json", lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    write_atomically(out / f"{TABLE}.md", lambda file: file.write(text.encode()))
    write_report(folders, out)
    return text


def common_settings(configs: Sequence[dict]) -> dict:
    """Return the settings that all runs share, except the places of files."""
    leave_out = {"run", "data", "cache", "classes"}
    first = configs[0]
    return {k: v for k, v in first.items() if k not in leave_out and all(c.get(k) == v for c in configs)}
