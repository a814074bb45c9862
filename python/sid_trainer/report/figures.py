"""The pictures over several runs: what was learned, by depth and by epoch, and what it cost in time and memory.

A colour is a method, a line's dashes are a layout, a marker and a paler colour are whatever else sets groups apart;
runs that differ only in the seed are thin lines around their mean. Pictures come back as PNG bytes.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .results import METHODS, Group, Run, in_bytes, rank, unit_of

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#CC79A7", "#D55E00")  # one a method of METHODS, then others'
OTHERS = ("#56B4E9", "#999999", "#B8A800")
DASHES = {"shared": "-", "stagewise": (0, (5, 1.6))}
MARKERS = "os^Dvp*Xhd<>"
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")
STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


class Look(NamedTuple):
    color: str
    linestyle: str | tuple
    marker: str


class Panel(NamedTuple):
    """One picture of curves; `curve` gives a run's x and y, or None where the run does not have them."""

    title: str
    x: str
    y: str
    curve: Callable[[Run], tuple[Sequence, Sequence] | None]
    kind: str = "share"  # or "log", "plain"


def by_stage(values: Sequence[float] | None):
    return values and (range(1, len(values) + 1), values)


def by_epoch(run: Run, key: str):
    return run.series("epoch"), run.series(key)


PANELS = (
    Panel("Accuracy by depth", "stage", "test accuracy", lambda run: by_stage(run.last["stage_accuracy"])),
    Panel("Distance to the truth by depth", "stage", "mean KL(y ‖ p$_i$), nats",
          lambda run: by_stage(run.last["stage_kl"]), "log"),
    Panel("Descent certificate by depth", "stage", "test images it holds for", lambda run: by_stage(run.certificate)),
    Panel("Test accuracy by epoch", "epoch", "test accuracy", lambda run: by_epoch(run, "test_accuracy")),
    Panel("Test accuracy against training time", "seconds", "test accuracy",
          lambda run: run.elapsed and (run.elapsed, run.series("test_accuracy"))),
    Panel("Training loss (each method's own)", "epoch", "mean over stages, nats",
          lambda run: by_epoch(run, "train_loss"), "plain"),
)  # fmt: skip


@matplotlib.rc_context(STYLE)
def draw_report(groups: Sequence[Group]) -> bytes:
    """Draw the panels that at least one run can fill, and bars of the methods if there are several; return a PNG."""
    looks, labels = looks_of(groups), labels_of(groups)
    panels = [panel for panel in PANELS if any(panel.curve(run) for group in groups for run in group.runs)]
    drawings: list[Callable[[Axes], object]] = [
        lambda axes, panel=panel: draw_panel(axes, panel, groups, looks) for panel in panels
    ]
    if len(groups) > 1:
        if any(run.most("activation_bytes") for group in groups for run in group.runs):
            drawings.append(lambda axes: draw_bytes(axes, groups, looks))
        drawings.append(lambda axes: draw_accuracies(axes, groups, looks))
    columns = 3
    rows = math.ceil(len(drawings) / columns)
    figure = Figure(figsize=(15.5, 3.9 * rows + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(rows, columns)
    for index, draw in enumerate(drawings):
        row, column = divmod(index, columns)
        last = index == len(drawings) - 1
        draw(figure.add_subplot(grid[row, column:] if last else grid[row, column]))
    handles = [Line2D([], [], **look._asdict(), linewidth=1.8, markersize=5) for look in looks]
    if any(run.ideal for group in groups for run in group.runs):
        handles.append(Line2D([], [], color=COLOURS[0], linestyle=":", linewidth=1.3))
        labels = [*labels, "ideal cascade of sid"]
    # beside a row of panels there is room for 18 entries
    figure.legend(handles, labels, loc="outside right upper", frameon=False, ncols=1 + len(handles) // (18 * rows))
    return as_png(figure)


def looks_of(groups: Sequence[Group]) -> list[Look]:
    colours = colours_of(group.family[2] for group in groups)
    rest = list(dict.fromkeys((group.family[0], group.family[3], group.variant) for group in groups))
    siblings: dict[tuple, list[int]] = {}
    for index, group in enumerate(groups):
        siblings.setdefault(group.family[1:3], []).append(index)
    looks = []
    for index, group in enumerate(groups):
        arch, layout, method, noise = group.family
        marker = MARKERS[rest.index((arch, noise, group.variant)) % len(MARKERS)]
        alike = siblings[layout, method]
        paler = 0.6 * alike.index(index) / max(len(alike) - 1, 2)
        color = to_hex((1 - paler) * np.array(to_rgb(colours[method])) + paler)
        looks.append(Look(color, DASHES.get(layout, "-."), marker))
    return looks


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    others = sorted(set(methods) - set(METHODS))
    return dict(zip(METHODS, COLOURS, strict=True)) | dict(zip(others, cycle(OTHERS), strict=False))


def labels_of(groups: Sequence[Group], method: bool = True) -> list[str]:
    """Return what sets each group apart, in words; the method is included if asked for."""
    parts = []
    for group in groups:
        arch, layout, name, noise = group.family
        parts.append((name if method else "", arch or "", layout or "", f"noise {noise:.0%}", group.variant))
    same = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    same[0] = not method
    return [
        plain(" · ".join(part for part, skip in zip(words, same, strict=True) if part and not skip)) for words in parts
    ]


def plain(text: str) -> str:
    """Text that matplotlib takes for no formula, whatever a user called things."""
    return text.replace("$", r"\$")


def draw_panel(axes: Axes, panel: Panel, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    staged = panel.x == "stage" and any(run.depth > 1 for group in groups for run in group.runs)
    seen, ideals = [], []
    for group, look in zip(groups, looks, strict=True):
        front = {"zorder": 3 if group.family[2] == "sid" else 2}
        curves = [panel.curve(run) for run in group.runs]
        curves = [(np.asarray(x, float), np.asarray(y, float)) for x, y in filter(None, curves)]
        if not curves:
            continue
        seen += [y for _, y in curves]
        common = min(len(x) for x, _ in curves)
        mean_x, mean_y = (np.mean([curve[axis][:common] for curve in curves], axis=0) for axis in (0, 1))
        if staged and common == 1:  # a plain network answers once: a level beside the others' stages
            axes.axhline(mean_y[0], color=look.color, linestyle=look.linestyle, linewidth=1.5, **front)
            continue
        if 1 < len(curves) and len(groups) <= 16:  # more would hide the means
            for x, y in curves:
                axes.plot(x, y, color=look.color, linestyle=look.linestyle, linewidth=0.7, alpha=0.4, **front)
        axes.plot(
            mean_x, mean_y, **look._asdict(), linewidth=1.8, markersize=4.5, markevery=max(1, common // 10), **front
        )
        if panel.kind == "log":
            for ideal in {tuple(run.ideal) for run in group.runs if run.ideal}:
                axes.plot(*by_stage(ideal), ":", color=look.color, linewidth=1.3, **front)
                ideals.append(min(ideal))
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.x != "seconds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = np.concatenate(seen)
    if panel.kind == "share":
        axes.yaxis.set_major_formatter(PERCENT)
    elif panel.kind == "log" and (values > 0).all() and np.isfinite(values).all():
        # an ideal cascade falls without end: it may not squeeze what was measured into a corner
        log_axis(axes, min(values.min(), max(min(ideals, default=math.inf), values.min() / 5)), values.max())


def log_axis(axes: Axes, lowest: float, highest: float) -> None:
    """Make the y axis logarithmic with plain numbers, whatever range it spans."""
    low, high = lowest / 1.3, highest * 1.3
    subs = (1, 1.5, 2, 3, 4, 6, 8) if high / low < 8 else (1, 2, 5) if high / low < 500 else (1,)
    axes.set(yscale="log", ylim=(low, high))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw_accuracies(axes: Axes, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    found = [[run.last["test_accuracy"] for run in group.runs] for group in groups]
    deviations = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in found]
    means = [float(np.mean(values)) for values in found]
    bars(axes, groups, looks, means, deviations, [f"{100 * mean:.1f}" for mean in means])
    axes.set(title="Methods side by side, last epoch", ylabel="test accuracy, ± deviation over seeds")
    axes.yaxis.set_major_formatter(PERCENT)


def draw_bytes(axes: Axes, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    told = {}  # label noise and most other settings change no byte: each sum is told once
    for group, look in zip(groups, looks, strict=True):
        held = max(run.most("activation_bytes") or 0 for run in group.runs)
        if held:
            told.setdefault((*group.family[:3], held), (group, look, held))
    groups, looks, held = zip(*told.values(), strict=True)
    families = [group.family for group in groups]
    groups = [group if families.count(group.family) > 1 else Group(group.runs) for group in groups]
    unit, name = unit_of(max(held))
    values = [count / unit for count in held]
    bars(axes, groups, looks, values, [0.0] * len(held), [f"{value:.3g}" for value in values])
    axes.set(title="Held for backward, at most in a step", ylabel=name)


def bars(axes: Axes, groups: Sequence[Group], looks: Sequence[Look], heights, deviations, texts) -> None:
    """Draw a cluster of bars for each architecture, layout and noise, with a bar for each method and variant."""
    clusters: dict[tuple, list[int]] = {}
    for index, group in enumerate(groups):
        arch, layout, _, noise = group.family
        clusters.setdefault((arch, layout, noise), []).append(index)
    top = max(height + spread for height, spread in zip(heights, deviations, strict=True)) or 1.0
    many = len(groups) > 10
    left, ticks = 0.0, []
    for members in clusters.values():
        several = len({groups[index].family for index in members}) < len(members)
        for place, index in enumerate(members):
            x, height, spread = left + place, heights[index], deviations[index]
            axes.bar(x, height, 0.85, color=looks[index].color, alpha=0.85)
            if spread:
                axes.errorbar(x, height, spread, color="#444444", capsize=2.5, linewidth=1.2)
            if several:
                axes.plot(x, 0.04 * top, looks[index].marker, color="white", markersize=4)
            axes.text(
                x, height + spread + 0.015 * top, texts[index], ha="center", va="bottom",
                rotation=90 if many else 0, fontsize=7.5 if many else 8.5,
            )  # fmt: skip
        ticks.append(left + (len(members) - 1) / 2)
        left += len(members) + 0.8
    if len(clusters) == 1:
        ticks, words = list(range(len(groups))), labels_of(groups)
    else:
        words = labels_of([Group(groups[members[0]].runs) for members in clusters.values()], method=False)
    words = [word.replace(" · ", "\n") for word in words]
    room = 45 * len(axes.get_subplotspec().colspan)  # characters side by side
    crowded = len(words) * max(len(line) + 2 for word in words for line in word.split("\n")) > room
    axes.set_xticks(ticks, words, **({"rotation": 30, "ha": "right", "fontsize": 8} if crowded else {}))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    middle = (left - 1.8) / 2
    half = max(middle + 1, 3)
    axes.set(xlim=(middle - half, middle + half), ylim=(0, top * (1.22 if many else 1.12)))


@matplotlib.rc_context(STYLE)
def draw_memory(rows: Sequence[dict]) -> bytes:
    """Draw the bytes held for backward against depth and against batch size; return a PNG.

    There is a row of panels for each architecture and layout, at the batch size and the depth that most rows have.
    `rows` are those of `read_memory`.
    """
    places = list(dict.fromkeys((row["arch"], row["layout"]) for row in rows))
    methods = sorted(dict.fromkeys(row["method"] for row in rows), key=rank)
    colours = colours_of(methods)
    looks = {  # later methods lie behind earlier ones, with larger markers, so that equal lines are still all seen
        method: {"color": colours[method], "marker": marker, "markersize": 4.5 + index, "zorder": 4 - index / 10}
        for index, (method, marker) in enumerate(zip(methods, cycle(MARKERS), strict=False))
    }
    figure = Figure(figsize=(11.5, 3.9 * len(places) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    every = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for (arch, layout), pair in zip(places, every, strict=True):
        here = [row for row in rows if (row["arch"], row["layout"]) == (arch, layout)]
        for axes, across, fixed in zip(pair, ("depth", "batch_size"), ("batch_size", "depth"), strict=True):
            at = most_common([row[fixed] for row in here])
            shown = [row for row in here if row[fixed] == at]
            for method in methods:
                points = sorted((row[across], row["saved_bytes"]) for row in shown if row["method"] == method)
                axes.plot(*zip(*points, strict=True), linestyle=DASHES.get(layout, "-"), **looks[method])
            words = {"depth": "depth", "batch_size": "batch size"}
            axes.set(title=plain(f"{arch}, {layout}: {words[fixed]} {at}"), xlabel=words[across])
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row[across] for row in shown}))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        pair[0].set_ylabel("held for backward")
        pair[0].set_yscale("log", base=2)
        pair[0].yaxis.set_major_formatter(FuncFormatter(lambda count, _: in_bytes(count)))
        pair[0].yaxis.set_minor_formatter(NullFormatter())
    handles = [Line2D([], [], **looks[method]) for method in methods]
    figure.legend(handles, [plain(method) for method in methods], loc="outside right upper", frameon=False)
    return as_png(figure)


def most_common(values: Sequence[int]) -> int:
    """Return the most frequent value; of several, the largest."""
    return max(set(values), key=lambda value: (values.count(value), value))


def as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
