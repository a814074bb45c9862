"""The picture of one run, and the report over several: their pictures and tables, in one HTML page and as PNG."""

import base64
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import write_atomically
from .results import (
    NOT_SETTINGS,
    Run,
    comparison_table,
    differing_settings,
    grouped,
    ideal_kl,
    in_bytes,
    is_number,
    load_runs,
    read_json,
    read_run,
    shown,
)

__all__ = ["as_markdown", "comparison_table", "draw_run", "ideal_kl", "load_runs", "read_run", "write_report"]


def draw_run(rows: Sequence[dict], file: Path, title: str = "", ideal: Sequence[float] | None = None) -> None:
    """Write a PNG: above, accuracy, KL and certificate rate by stage, one line an epoch; below, them and loss by epoch.

    Rows without certificate rates, or with one stage, leave those panels out.

    `ideal` is drawn beside the KL by stage, for methods whose ideal is known (`ideal_kl`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

    ideal = ideal if ideal and min(ideal) > 0 else None  # with alpha = 1 it is 0 everywhere
    epochs = [row["epoch"] for row in rows]
    stages = range(1, len(rows[-1]["stage_accuracy"]) + 1)
    colours = LinearSegmentedColormap.from_list("epochs", plt.get_cmap("viridis_r")(np.linspace(0.12, 0.95, 64)))
    shade = Normalize(epochs[0], max(epochs[-1], epochs[0] + 1))
    certified = len(stages) > 1 and all(row.get("certificate") for row in rows)
    small = {"markersize": 4}
    style = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        columns = 3 if certified else 2
        figure = plt.figure(figsize=(5 * columns, 7.2), layout="constrained")
        (by_stage, kl_by_stage, *certificate_by_stage), (by_epoch, loss_by_epoch, *certificate_by_epoch) = (
            figure.subplots(2, columns)
        )
        for row in rows:
            look = {"color": colours(shade(row["epoch"])), "marker": "o", "markersize": 3.5, "linewidth": 1.6}
            by_stage.plot(stages, row["stage_accuracy"], **look)
            kl_by_stage.plot(stages, row["stage_kl"], **look)
            for axes in certificate_by_stage:
                axes.plot(stages, row["certificate"], **look)
        if ideal:
            kl_by_stage.plot(stages, ideal, ":", color="#d1495b", label="ideal cascade", zorder=5)
            kl_by_stage.legend(frameon=False, loc="upper right")
        by_stage.set(title="Accuracy by stage", xlabel="stage", ylabel="test accuracy")
        kl_by_stage.set(title="Distance to the truth by stage", xlabel="stage", ylabel="mean KL(y ‖ p$_i$), nats")
        lowest, highest = (pick(pick(row["stage_kl"]) for row in rows) for pick in (min, max))
        if lowest > 0 and math.isfinite(
            highest
        ):  # on a logarithmic axis the ideal cascade is nearly a line, of slope log(1 - alpha)
            lowest = min(lowest, ideal[0]) if ideal else lowest
            kl_by_stage.set(yscale="log", ylim=(lowest / 1.5, highest * 2.5))
            kl_by_stage.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            kl_by_stage.yaxis.set_major_formatter("{x:g}")
            kl_by_stage.yaxis.set_minor_locator(NullLocator())
        if len(rows) > 1:
            scale = plt.cm.ScalarMappable(norm=shade, cmap=colours)
            bar = figure.colorbar(scale, ax=[by_stage, kl_by_stage, *certificate_by_stage], label="epoch", pad=0.01)
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))

        by_epoch.plot(
            epochs, [row["test_accuracy"] for row in rows], "o-", **small, color="#3b528b", label="last stage"
        )
        by_epoch.plot(
            epochs, [row["stage_accuracy"][0] for row in rows], "o--", **small, color="#9aa5b1", label="first stage"
        )
        by_epoch.set(title="Accuracy by epoch", xlabel="epoch", ylabel="test accuracy")
        by_epoch.legend(frameon=False)
        loss_by_epoch.plot(
            epochs, [row["train_loss"] for row in rows], "o-", **small, color="#21918c", label="training loss"
        )
        loss_by_epoch.plot(
            epochs, [row["stage_kl"][-1] for row in rows], "o--", **small, color="#5ec962", label="test KL(y ‖ p$_L$)"
        )
        loss_by_epoch.set(title="Loss by epoch", xlabel="epoch", ylabel="nats")
        loss_by_epoch.legend(frameon=False)
        for axes in certificate_by_stage:
            axes.set(title="Descent certificate by stage", xlabel="stage", ylabel="test images it holds for")
        for axes in certificate_by_epoch:
            rates = [mean(row["certificate"]) for row in rows]
            axes.plot(epochs, rates, "o-", **small, color="#3b528b")
            axes.set(title="Descent certificate by epoch", xlabel="epoch", ylabel="mean over stages")
        for axes in (by_stage, by_epoch, *certificate_by_stage, *certificate_by_epoch):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        for axes in figure.axes[: 2 * columns]:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(rows) == 1:
            for axes in (by_epoch, loss_by_epoch, *certificate_by_epoch):
                axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        figure.suptitle(shown(title), parse_math=False)  # a folder's name is no formula
        write_atomically(file, lambda out: figure.savefig(out, format="png", dpi=130))
        plt.close(figure)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def size(value: float | None) -> str:
    return "–" if value is None else in_bytes(value)


def mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def epochs_of(run: Run) -> str:
    done, asked = run.last["epoch"], run.config.get("epochs", run.last["epoch"])
    return f"{done}" if done == asked else f"{done} of {shown(asked)}"


COMPARISON: dict[str, Callable[[dict], str]] = {
    "arch": lambda row: shown(row["arch"]),
    "layout": lambda row: shown(row["layout"]),
    "method": lambda row: row["method"],
    "label noise": lambda row: f"{row['label_noise']:.0%}",
    "settings": lambda row: row["settings"] or "–",
    "test accuracy, last epoch": lambda row: (
        percent(row["test_accuracy"]) + ("" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}")
    ),
    "runs": lambda row: str(row["n"]),
    "seeds": lambda row: ", ".join(map(shown, row["seeds"])),
    "epochs": lambda row: ", ".join(map(str, row["epochs"])),
    "images/s": lambda row: number(row["images_per_second"]),
    "held for backward": lambda row: size(row["activation_bytes"]),
    "peak memory": lambda row: size(row["peak_memory_bytes"]),
}
RUNS: dict[str, Callable[[Run], str]] = {
    "run": lambda run: run.name,
    "arch": lambda run: shown(run.config.get("arch")),
    "layout": lambda run: shown(run.config.get("layout")),
    "method": lambda run: run.config["method"],
    "label noise": lambda run: f"{run.config.get('label_noise') or 0:.0%}",
    "depth": lambda run: shown(run.config.get("depth", run.depth)),
    "seed": lambda run: shown(run.config.get("seed")),
    "epochs": epochs_of,
    "test accuracy": lambda run: percent(run.last["test_accuracy"]),
    "best stage": lambda run: percent(max(run.last["stage_accuracy"])),
    "first stage": lambda run: percent(run.last["stage_accuracy"][0]),
    "KL of the last stage": lambda run: number(run.last["stage_kl"][-1], 4),
    "certificate": lambda run: percent(mean(run.certificate)),
    "images/s": lambda run: number(run.images_per_second),
    "training seconds": lambda run: number(run.elapsed and run.elapsed[-1], 1),
    "held for backward": lambda run: size(run.most("activation_bytes")),
    "peak memory": lambda run: size(run.most("peak_memory_bytes")),
}

MEMORY: dict[str, Callable[[dict], str]] = {
    "arch": lambda row: row["arch"],
    "layout": lambda row: row["layout"],
    "method": lambda row: row["method"],
    "depth": lambda row: str(row["depth"]),
    "batch size": lambda row: str(row["batch_size"]),
    "held for backward": lambda row: size(row["saved_bytes"]),
    "peak": lambda row: size(row.get("peak_bytes")),
}


PIPELINE: dict[str, Callable[[dict], str]] = {
    "run": lambda one: one["run"],
    "rank": lambda one: str(one["rank"]),
    "stages": lambda one: ", ".join(map(str, one["stages"])),
    "busy, seconds": lambda one: number(one["busy"], 2),
    "waited for batches": lambda one: number(one["receiving"], 2),
    "waited for room": lambda one: number(one["sending"], 2),
    "waited for replicas": lambda one: number(one["reducing"], 2),
    "sent on": lambda one: size(one["bytes_sent"]),
    "peak memory": lambda one: size(one["peak_memory_bytes"]),
}


def as_cells(columns: dict[str, Callable], items: Sequence) -> tuple[list[str], list[list[str]]]:
    """Return a table's titles and its rows as text, without the columns in which no row has a value."""
    kept = {title: [words(item) for item in items] for title, words in columns.items()}
    kept = {title: cells for title, cells in kept.items() if set(cells) != {"–"}}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def as_markdown(table: Sequence[dict]) -> str:
    """Return the rows of `comparison_table` as a Markdown table."""
    return markdown(COMPARISON, table)


def markdown(columns: dict[str, Callable], items: Sequence) -> str:
    titles, rows = as_cells(columns, items)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def read_memory(file: Path) -> dict:
    """Read a memory table, {"what": text, "rows": [...]}. Raises ValueError, in one line, if the file is none.

    Each row has layout, arch, method, depth, batch_size, saved_bytes and peak_bytes, which may be null.
    """
    found = read_json(file)
    names, numbers = {"layout", "arch", "method"}, {"depth", "batch_size", "saved_bytes"}
    rows = found.get("rows") if isinstance(found, dict) else None
    whole = isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in names)
        and all(is_number(row.get(key)) and row[key] > 0 for key in numbers)
        and (row.get("peak_bytes") is None or is_number(row["peak_bytes"]))
        for row in rows
    )
    if not rows or not whole:
        raise ValueError(f"{file}: not a memory table: rows must be a list of {', '.join(sorted(names | numbers))}")
    return {"what": shown(found.get("what")), "rows": rows}


def write_report(folders: Sequence[Path], out: Path, memory: Path | None = None) -> Path:
    """Write report.png and report.html about the runs in `folders` into the folder `out`; return the page's path.

    The page needs no other file. If `memory` names a memory table (`read_memory`), memory.png is added; if the stages
    of a run were spread over ranks, pipeline.png.

    Raises ValueError, in one line that names the file, before anything is written, if a folder holds no whole run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from .figures import draw_memory, draw_report
    from .pipeline_figures import draw_pipelines

    runs = load_runs(folders)
    groups = grouped(runs)
    ordered = [run for group in groups for run in group.runs]
    table = None if memory is None else read_memory(Path(memory))
    pictures = {"report.png": draw_report(groups)}
    if table:
        pictures["memory.png"] = draw_memory(table["rows"])
    pipelines = [(run.name, run.pipeline) for run in ordered if run.pipeline]
    if pipelines:
        pictures["pipeline.png"] = draw_pipelines(pipelines)
    every_rank = [{"run": name} | rank for name, about in pipelines for rank in about["ranks"]]
    differing = differing_settings(ordered)
    named = [key for key in ordered[0].config if key == "seed" or key not in NOT_SETTINGS]
    settings = {"run": lambda run: run.name}
    settings |= {key: lambda run, key=key: shown(run.config.get(key)) for key in differing}
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        comparison=as_cells(COMPARISON, comparison_table(runs)),
        runs=as_cells(RUNS, ordered),
        differing=as_cells(settings, ordered) if differing else None,
        same={key: shown(ordered[0].config[key]) for key in named if key not in differing},
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        pipeline_table=as_cells(PIPELINE, every_rank) if every_rank else None,
        memory=table and table["what"],
        memory_table=table and as_cells(MEMORY, table["rows"]),
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {**pictures, "report.html": page.encode()}.items():
        write_atomically(out / name, lambda file, content=content: file.write(content))
    return out / "report.html"
