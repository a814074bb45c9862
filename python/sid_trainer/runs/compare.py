"""Compare methods: train each with every seed under one budget, and write a table of means and deviations."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from ..files import METRICS, write_atomically
from ..report.page import as_markdown, comparison_text, write_report
from ..report.results import comparison_table, load_runs
from ..training.checkpoint import check_same, has_checkpoint
from ..training.config import MOVABLE, RunConfig, stage_alphas
from .build import load_saved_run, make_trainer, resume_run


def compare_methods(
    base: RunConfig, out: Path, *, methods: Sequence[str], layouts: Sequence[str], seeds: Sequence[int],
    label_noises: Sequence[float] = (0.0,), command: str = "",
) -> str:  # fmt: skip
    """Train all combinations of methods, layouts, seeds and label noises; return their table in Markdown.

    The other settings are those of `base`. Each run has a folder of its own in `out`; table.json, table.md and the
    report are written there, too. Finished runs are kept and others are resumed, so a comparison that was stopped
    continues, and parts of it may run at the same time.

    Raises ValueError, before anything is trained, if a run in `out` has other settings.
    """
    if base.parallel != "none":
        raise ValueError(f"parallel {base.parallel!r} is for one run; a comparison makes many, each in one process")
    runs = []
    for noise, layout, method, seed in product(label_noises, layouts, methods, seeds):
        name = f"{layout}-{method}" + (f"-noise{noise:g}" if noise else "") + f"-seed{seed}"
        run = replace(base, method=method, layout=layout, seed=seed, label_noise=noise)
        runs.append((out / name, run))
    for folder, run in runs:
        if run.network is None:
            stage_alphas(run)  # raises ValueError for alphas that do not fit the layout
        if has_checkpoint(folder):
            settings = asdict(run)
            names = [name for name in settings if name not in MOVABLE]
            check_same(folder, asdict(load_saved_run(folder)[0]), settings, names)
    for i, (folder, run) in enumerate(runs, 1):
        if epochs_done(folder) < run.epochs:
            print(f"\n[{i}/{len(runs)}] {folder.name}", flush=True)
            moved = {name: getattr(run, name) for name in MOVABLE}
            trainer = resume_run(folder, **moved) if has_checkpoint(folder) else make_trainer(run, folder)
            trainer.fit()
    return write_table([folder for folder, _ in runs], out, command)


def epochs_done(folder: Path) -> int:
    """Return the number of epochs that the run in a folder has finished."""
    metrics = folder / METRICS
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def write_table(folders: Sequence[Path], out: Path, command: str = "") -> str:
    """Write the comparison of the runs in `folders` as table.json and table.md, and the report; return the table."""
    runs = load_runs(folders).runs
    text = as_markdown(comparison_text(runs))
    table = json.loads(comparison_table(runs).to_json(orient="records", double_precision=15))
    first, *others = runs["config"]
    shared = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    settings = {name: value for name, value in shared.items() if name not in ("run", "data", "cache", "classes")}
    record = json.dumps({"command": command, "settings": settings, "table": table}, indent=1) + "\n"
    write_atomically(out / "table.json", lambda file: file.write(record.encode()))
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    write_report(folders, out)
    return text
