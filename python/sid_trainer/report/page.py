"""The report about run folders: its tables as text, and the page that holds them and the pictures."""

import base64
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_atomically
from .figures import draw_pipelines, draw_report, in_bytes
from .results import comparison_table, load_runs, settings_of, shown

percent, seconds = "{:.2%}".format, "{:.2f}".format
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # title and text of a value; for others name and `shown`
    "name": ("run", str), "label_noise": ("label noise", "{:.0%}".format), "n": ("runs", str),
    "settings": ("settings", lambda text: text or "–"), "test_accuracy": ("test accuracy", percent),
    "best_stage": ("best stage", percent), "first_stage": ("first stage", percent),
    "last_kl": ("KL of the last stage", "{:.4f}".format), "certificate": ("certificate", percent),
    "images_per_second": ("images/s", "{:.0f}".format), "elapsed": ("training seconds", "{:.1f}".format),
    "activation_bytes": ("held for backward", in_bytes), "peak_memory_bytes": ("peak memory", in_bytes),
    "busy": ("busy, seconds", seconds), "receiving": ("waited for batches", seconds),
    "sending": ("waited for room", seconds), "reducing": ("waited for replicas", seconds),
    "bytes_sent": ("sent on", in_bytes),
}  # fmt: skip
MEASURED = ["images_per_second", "activation_bytes", "peak_memory_bytes"]
COMPARISON = [
    *"arch layout method label_noise settings".split(),
    "accuracy, last epoch",
    *"n seeds epochs".split(),
    *MEASURED,
]
RUNS = [*"name arch layout method label_noise depth seed epochs test_accuracy best_stage first_stage".split(),
        "last_kl", "certificate", "elapsed", *MEASURED]  # fmt: skip
RANKS = "name rank stages busy receiving sending reducing bytes_sent peak_memory_bytes".split()


def as_text(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of a table as text under their titles, without those in which no row has a value."""
    text = {}
    for column in columns:
        title, form = COLUMNS.get(column, (column, shown))
        known = table[column].notna()
        cells = [form(value) if there else "–" for value, there in zip(table[column], known, strict=True)]
        if {*cells} != {"–"}:
            text[title] = cells
    return pd.DataFrame(text, index=table.index)


def comparison_text(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `comparison_table` as text, the accuracy with its deviation in points."""
    table = comparison_table(runs)
    spread = table["deviation"].map(lambda deviation: "" if pd.isna(deviation) else f" ± {100 * deviation:.2f}")
    return as_text(table.assign(**{"accuracy, last epoch": table["test_accuracy"].map(percent) + spread}), COMPARISON)


def as_markdown(text: pd.DataFrame) -> str:
    """Return a table of text as Markdown."""
    lines: list[list[str]] = [[*map(str, text.columns)], ["---"] * text.shape[1], *text.to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write report.png and report.html about the runs in `folders` into the folder `out`; return the page's path.

    The page needs no other file. pipeline.png is added if the stages of a run were spread over ranks.

    Raises ValueError, in one line that names the file, before anything is written, if a folder holds no whole run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    results = load_runs(folders)
    runs = results.runs
    asked = [config.get("epochs", done) for config, done in zip(runs["config"], runs["epoch"], strict=True)]
    epochs = [shown(n) if n == of else f"{n:.0f} of {shown(of)}" for n, of in zip(runs["epoch"], asked, strict=True)]
    depth = [config.get("depth", stages) for config, stages in zip(runs["config"], runs["stages"], strict=True)]
    pictures = {"report.png": draw_report(results)}
    names = zip(runs.index.tolist(), runs["name"], strict=True)
    pipelines = [(name, results.pipelines[run]) for run, name in names if run in results.pipelines]
    if pipelines:
        pictures["pipeline.png"] = draw_pipelines(pipelines)
    ranks = pd.DataFrame([rank | {"name": name} for name, pipeline in pipelines for rank in pipeline["ranks"]])
    settings = settings_of(runs, shown)
    differing = settings.nunique() > 1
    page = Environment(
        loader=PackageLoader("sid_trainer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja").render(
        comparison=comparison_text(runs),
        runs=as_text(runs.assign(epochs=epochs, depth=depth), RUNS),
        differing=pd.concat([runs["name"].rename("run"), settings.loc[:, differing]], axis=1),
        same=settings.loc[:, ~differing].head(1).T.reset_index().set_axis(["setting", "value"], axis=1),
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        ranks=as_text(ranks, RANKS) if pipelines else None,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {**pictures, "report.html": page.encode()}.items():
        write_atomically(out / name, methodcaller("write", content))
    return out / "report.html"
