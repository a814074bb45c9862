"""Write the report about run folders: an HTML page with its tables and pictures."""

import base64
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_atomically
from .figures import draw_pipelines, draw_report, format_bytes
from .results import SPEEDS, comparison_table, load_runs, settings_of, to_text

percent, seconds = "{:.2%}".format, "{:.2f}".format
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # title, formatter; others: name, `to_text`
    "name": ("run", str), "label_noise": ("label noise", "{:.0%}".format), "n": ("runs", str),
    "settings": ("settings", lambda text: text or "–"), "test_accuracy": ("test accuracy", percent),
    "best_stage": ("best stage", percent), "first_stage": ("first stage", percent),
    "last_kl": ("KL of the last stage", "{:.4f}".format), "certificate": ("certificate", percent),
    "images_per_second": ("images/s", "{:.0f}".format), "tokens_per_second": ("tokens/s", "{:.0f}".format),
    "elapsed": ("training seconds", "{:.1f}".format),
    "activation_bytes": ("held for backward", format_bytes), "peak_memory_bytes": ("peak memory", format_bytes),
    "busy": ("busy, seconds", seconds), "receiving": ("waited for batches", seconds),
    "sending": ("waited for room", seconds), "reducing": ("waited for replicas", seconds),
    "bytes_sent": ("sent on", format_bytes),
}  # fmt: skip
MEASURED = [*SPEEDS, "activation_bytes", "peak_memory_bytes"]
COMPARISON = [*"arch layout method label_noise settings".split(), "accuracy, last epoch", *"n seeds epochs".split(),
              *MEASURED]  # fmt: skip
RUNS = [*"name arch layout method label_noise depth seed epochs test_accuracy best_stage first_stage".split(),
        "last_kl", "certificate", "elapsed", *MEASURED]  # fmt: skip
RANKS = "name rank stages busy receiving sending reducing bytes_sent peak_memory_bytes".split()


def as_text(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Format columns of a table as text under their titles; drop those in which no row has a value."""
    text = {}
    for column in columns:
        title, format_value = COLUMNS.get(column, (column, to_text))
        known = table[column].notna()
        cells = [format_value(value) if is_known else "–" for value, is_known in zip(table[column], known, strict=True)]
        if {*cells} != {"–"}:
            text[title] = cells
    return pd.DataFrame(text, index=table.index)


def comparison_text(runs: pd.DataFrame) -> pd.DataFrame:
    """Format `comparison_table` as text, with the accuracy's standard deviation in percentage points."""
    table = comparison_table(runs)
    spread = table["deviation"].map(lambda deviation: "" if pd.isna(deviation) else f" ± {100 * deviation:.2f}")
    return as_text(table.assign(**{"accuracy, last epoch": table["test_accuracy"].map(percent) + spread}), COMPARISON)


def as_markdown(text: pd.DataFrame) -> str:
    """Format a table of text as Markdown."""
    lines: list[list[str]] = [[*map(str, text.columns)], ["---"] * text.shape[1], *text.to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write report.png and report.html about the runs in `folders` into the folder `out`; return the page's path.

    The page needs no other file. If the stages of a run were spread over ranks, it also writes pipeline.png.

    Raises ValueError with one line that names the file if a folder holds no complete run; nothing is written then.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    results = load_runs(folders)
    runs = results.runs
    planned = [config.get("epochs", done) for config, done in zip(runs["config"], runs["epoch"], strict=True)]
    done = zip(runs["epoch"], planned, strict=True)
    epochs = [to_text(n) if n == total else f"{n:.0f} of {to_text(total)}" for n, total in done]
    depth = [config.get("depth", stages) for config, stages in zip(runs["config"], runs["stages"], strict=True)]
    pictures = {"report.png": draw_report(results)}
    names = zip(runs.index.tolist(), runs["name"], strict=True)
    pipelines = [(name, results.pipelines[run]) for run, name in names if run in results.pipelines]
    if pipelines:
        pictures["pipeline.png"] = draw_pipelines(pipelines)
    ranks = pd.DataFrame([rank | {"name": name} for name, pipeline in pipelines for rank in pipeline["ranks"]])
    settings = settings_of(runs, to_text)
    differing = settings.nunique() > 1
    loader = PackageLoader("sid_trainer.report", ".")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.jinja")
    fields = dict(
        comparison=comparison_text(runs),
        runs=as_text(runs.assign(epochs=epochs, depth=depth), RUNS),
        differing=pd.concat([runs["name"].rename("run"), settings.loc[:, differing]], axis=1),
        same=settings.loc[:, ~differing].head(1).T.reset_index().set_axis(["setting", "value"], axis=1),
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        ranks=as_text(ranks, RANKS) if pipelines else None,
    )
    with pd.option_context("display.max_colwidth", None):  # `to_html` cuts longer text
        page = template.render(fields)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {**pictures, "report.html": page.encode()}.items():
        write_atomically(out / name, methodcaller("write", content))
    return out / "report.html"
