"""Methods side by side under one budget: every method with every seed, then a table of means and deviations."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from ..files import write_atomically
from ..report.page import as_markdown, comparison_table, load_runs, write_report
from ..training.checkpoint import LAST, PREVIOUS
from ..training.config import MOVABLE, RunConfig, stage_alphas
from .build import make_trainer, resume_run, saved_run

TABLE = "table"


def compare(
    base: RunConfig, out: Path, *, methods: Sequence[str], layouts: Sequence[str], seeds: Sequence[int],
    noises: Sequence[float] = (0.0,), command: str = "",
) -> str:  # fmt: skip
    """Train every combination of methods, layouts, seeds and noises on the settings `base`; return the table as text.

    Each run has a folder of its own in `out`; table.json, table.md and the report are written there too.

    Runs that are there and finished are taken as they are, those begun are resumed: a comparison that was stopped goes
    on, and parts of it may run at the same time. Raises ValueError where a run there has other settings.
    """
    if base.parallel != "none":
        raise ValueError(f"parallel {base.parallel!r} is for one run; a comparison makes many, each in one process")
    cells = list(planned(base, out, methods, layouts, seeds, noises))
    for folder, run in cells:  # before the first is begun
        stage_alphas(run)
        check(folder, run)
    for i, (folder, run) in enumerate(cells, 1):
        if epochs_done(folder) < run.epochs:
            print(f"\n[{i}/{len(cells)}] {folder.name}", flush=True)
            begun = (folder / LAST).exists() or (folder / PREVIOUS).exists()
            moved = {name: getattr(run, name) for name in MOVABLE}
            (resume_run(folder, **moved) if begun else make_trainer(run, folder)).fit()
    folders = [folder for folder, _ in cells]
    return write_table(folders, out, command)


def planned(base, out, methods, layouts, seeds, noises) -> Iterable[tuple[Path, RunConfig]]:
    for noise, layout, method, seed in product(noises, layouts, methods, seeds):
        name = f"{layout}-{method}" + (f"-noise{noise:g}" if noise else "") + f"-seed{seed}"
        yield out / name, dataclasses.replace(base, method=method, layout=layout, seed=seed, label_noise=noise)


def check(folder: Path, run: RunConfig) -> None:
    if not (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        return
    saved, _ = saved_run(folder)  # a setting younger than the run has its default there
    for name, own in dataclasses.asdict(run).items():
        there = getattr(saved, name)
        if there != own and name not in MOVABLE:
            raise ValueError(f"{folder}: was run with {name} {there!r}, not {own!r}; choose another --out")


def epochs_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def write_table(folders: Sequence[Path], out: Path, command: str = "") -> str:
    runs = load_runs(folders)
    table = comparison_table(runs)
    text = as_markdown(table)
    record = {"command": command, "settings": common_settings([run.config for run in runs]), "table": table}
    write_atomically(out / f"{TABLE}.json", lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    write_atomically(out / f"{TABLE}.md", lambda file: file.write(text.encode()))
    write_report(folders, out)
    return text


def common_settings(configs: Sequence[dict]) -> dict:
    """Return the settings that all runs share, except the places of files."""
    leave_out = {"run", "data", "cache", "classes"}
    first = configs[0]
    return {k: v for k, v in first.items() if k not in leave_out and all(c.get(k) == v for c in configs)}
