"""Draw runs and their pipelines as PNG bytes. Lines and bars are means over seeds, bands the standard deviation."""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from .results import METHODS, Results, to_text

STYLE: Any = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}  # fmt: skip
PANELS = {  # column: title, label of its axis
    "stage_accuracy": ("Accuracy", "test accuracy"),
    "stage_kl": ("Distance to the truth", "mean KL(y ‖ p$_i$), nats"),
    "certificate": ("Descent certificate", "test images it holds for"),
    "test_accuracy": ("Test accuracy", "test accuracy"),
    "train_loss": ("Training loss", "each method's own, mean over stages, nats"),
}
BY_STAGE = list(PANELS)[:3]
BY_TIME = (("epoch", "test_accuracy"), ("seconds", "test_accuracy"), ("epoch", "train_loss"))
BARS = {
    "test_accuracy": "Test accuracy",
    "images_per_second": "Images/s",
    "tokens_per_second": "Tokens/s",
    "activation_bytes": "Held for backward",
}


@matplotlib.rc_context(STYLE)
def draw_run(results: Results) -> bytes:
    """Draw accuracy, KL and certificate of one run: by stage with a line per epoch, by epoch with a line per stage."""
    run, stages = results.runs.iloc[0], results.stages.astype({"epoch": int})  # for the legend: 1, not 1.0
    columns = BY_STAGE if pd.notna(run["certificate"]) else BY_STAGE[:2]
    figure = Figure(figsize=(5 * len(columns) + 0.8, 7.2), layout="constrained")
    for row, (x, hue) in enumerate((("stage", "epoch"), ("epoch", "stage"))):
        for place, column in enumerate(columns, row * len(columns) + 1):
            axes = figure.add_subplot(2, len(columns), place)
            last = column == columns[-1]
            sns.lineplot(stages, x=x, y=column, hue=hue, palette="crest", marker="o", markeredgewidth=0, errorbar=None,
                         legend="auto" if last else False, ax=axes)  # fmt: skip
            if last:
                sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1))
            format_panel(axes, column, x, stages[column])
            if x == "epoch" and column == "stage_kl":
                loss = axes.plot(results.epochs["epoch"], results.epochs["train_loss"], "k--")
                axes.legend(loss, ["training loss"])
                axes.autoscale(axis="y")
    figure.suptitle(run["name"], parse_math=False)
    return as_png(figure)


@matplotlib.rc_context(STYLE)
def draw_exits(metrics: dict[str, Any]) -> bytes:
    """Draw accuracy over operations per image, one point per confidence, from `evaluate_run(exits=True)`."""
    rows = metrics["exits"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["operations"] for row in rows], [row["accuracy"] for row in rows], "o-", label="leave if sure")
    last_label = -math.inf
    for row in rows:
        if row["operations"] > last_label + 0.04 * rows[-1]["operations"]:  # skip labels that would overlap
            last_label, place = row["operations"], (row["operations"], row["accuracy"])
            axes.annotate(str(row["confidence"]), place, (-4, 7), textcoords="offset points", size=8)
    if "plain" in metrics:
        axes.plot(metrics["plain_operations"], metrics["plain"], "ks", label="trunk and last head alone")
    axes.set(xlabel="operations per image, mean", ylabel="test accuracy", title="Early exit, by confidence")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="best")
    return as_png(figure)


@matplotlib.rc_context(STYLE)
def draw_report(results: Results) -> bytes:
    """Draw runs in shared panels: by stage after the last epoch, by epoch and by time; bars for several groups."""
    runs, epochs, stages = results.runs, results.epochs, results.stages[results.stages["last"]]
    epochs = epochs.assign(seconds=epochs.groupby(["group", "epoch"])["elapsed"].transform("mean"))
    single_stage = stages["run"].map(runs["stages"]) == 1  # whose answer is drawn as a level line beside other stages
    levels = stages[single_stage].drop(columns="stage").merge(stages[["stage"]].drop_duplicates(), how="cross")
    stages = pd.concat([stages[~single_stage], levels.assign(certificate=math.nan)], ignore_index=True)
    panels = [(stages, "stage", y) for y in BY_STAGE] + [(epochs, x, y) for x, y in BY_TIME]
    panels = [(table, x, y) for table, x, y in panels if (table[x].notna() & table[y].notna()).any()]
    bars = [column for column in BARS if runs["group"].nunique() > 1 and runs[column].notna().any()]
    methods = [*METHODS, *sorted({*runs["method"]} - {*METHODS})]
    palette = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    rows, several_variants = math.ceil(len(panels) / 3), runs["variant"].nunique() > 1
    heights = [3.9 * rows + 0.3] + [0.9 + 0.3 * runs["group"].nunique()] * bool(bars)
    figure = Figure(figsize=(15.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, (table, x, y) in enumerate(panels, 1):
        axes = parts[0].add_subplot(rows, 3, place)
        style = {"style": "variant", "markers": True} if several_variants else {"marker": "o"}
        sns.lineplot(table, x=x, y=y, hue="method", palette=palette, errorbar="sd", markeredgewidth=0, **style, ax=axes)
        legend = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        format_panel(axes, y, x, table[y])
    parts[0].legend(*legend, loc="outside right upper")
    for place, column in enumerate(bars, 1):
        axes = parts[1].add_subplot(1, len(bars), place)
        sns.barplot(runs, x=column, y="variant", hue="method", orient="h", palette=palette, errorbar="sd",
                    err_kws={"linewidth": 1.2}, legend=False, ax=axes)  # fmt: skip
        format_value = {"test_accuracy": "{:.1%}".format, "activation_bytes": format_bytes}.get(column, "{:.0f}".format)
        for bar in axes.containers:
            axes.bar_label(bar, fmt=format_value, label_type="center", color="white", fontsize=8.5)
        axes.set(title=f"{BARS[column]}, mean ± deviation over seeds", xlabel="", ylabel="", xticks=[])
        if place > 1:
            axes.set_yticklabels([])
    return as_png(figure)


def format_panel(axes: Axes, column: str, x: str, values: Iterable[float]) -> None:
    """Set title, labels and scales of a panel."""
    title, label = PANELS[column]
    axes.set(title=f"{title} by {'training time' if x == 'seconds' else x}", xlabel=x, ylabel=label)
    if x != "seconds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column not in ("stage_kl", "train_loss"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    values = np.asarray(list(values) if column == "stage_kl" else [], float)
    if len(values) and (values > 0).all() and np.isfinite(values).all():
        low, high = values.min(), values.max()
        axes.set(yscale="log", ylim=(low / 1.3, high * 1.3))
        subs = (1, 1.5, 2, 3, 4, 6, 8) if high / low < 5 else (1, 2, 5) if high / low < 300 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


@matplotlib.rc_context(STYLE)
def draw_pipelines(pipelines: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """Draw when the ranks of each pipeline (name, content of pipeline.json) ran the first batches of the last epoch."""
    heights = [1.5 + 0.42 * len(pipeline["ranks"]) for _, pipeline in pipelines]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, pipeline) in zip(panels, pipelines, strict=True):
        ranks = pipeline["ranks"]
        for row, rank in enumerate(ranks):
            spans = [(start, end - start) for start, end in rank["batches"]]
            axes.broken_barh(spans, (row - 0.42, 0.84), facecolors=sns.color_palette("colorblind", 7))
        shares = {"idle": "bubble", "predicted": "predicted_bubble", "imbalance": "imbalance"}
        summary = ", ".join(f"{word} {pipeline[key]:.1%}" for word, key in shares.items())
        axes.set_title(f"{name}: {summary}", parse_math=False)
        axes.set(xlabel="seconds", ylim=(len(ranks) - 0.5, -0.5))
        axes.set_yticks(range(len(ranks)), [f"rank {rank['rank']}, stages {to_text(rank['stages'])}" for rank in ranks])
        axes.grid(axis="y", visible=False)
    return as_png(figure)


def format_bytes(count: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    power = min(int(math.log2(max(count, 1)) // 10), 3)
    value = count / 2 ** (10 * power)
    return f"{value:{'.0f' if value >= 1000 else '.3g'}} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
