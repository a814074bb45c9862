"""Draw the picture of `simulate.py`: simulated pipelines on one time axis, and the throughput of all."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from bench.pipeline.simulator import SCHEDULES, Event

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800")  # of batches, repeated
PALER = {"forward": 0.0, "backward": 0.45, "weights": 0.62, "update": 0.78}  # 0: the color of the batch, 1: white
OTHER = "#555555"  # messages, loading and overhead
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.titlelocation": "left"}


@matplotlib.rc_context(STYLE)
def draw_outlook(pipelines: Sequence[tuple[str, Sequence[Event]]], until: float, rows: Sequence[dict]) -> bytes:
    """Draw a timeline of each simulated pipeline, and below them throughput against ranks. Returns the PNG file.

    pipelines: title and events of each. until: end of the time axis in seconds. rows: dicts with schedule, ranks and
    images_per_second.
    """
    ranks = 1 + max(event.rank for _, events in pipelines for event in events)
    height = min(0.6 + 0.22 * ranks, 4.5)
    figure = Figure(figsize=(13, (height + 0.4) * len(pipelines) + 4.2), layout="constrained")
    *panels, below = figure.subplots(len(pipelines) + 1, 1, height_ratios=[height] * len(pipelines) + [3.6])
    for axes, (title, events) in zip(panels, pipelines, strict=True):
        draw_timeline(axes, events, title, until)
        if axes is not panels[-1]:
            axes.set_xlabel("")
    seen = {event.kind for _, events in pipelines for event in events}
    legend = {
        "backward of the weights" if kind == "weights" else kind: color(0, kind) for kind in PALER if kind in seen
    }
    if seen - set(PALER):
        legend["messages, loading"] = OTHER
    panels[0].legend(
        [Patch(color=shade) for shade in legend.values()], legend, loc="lower right", bbox_to_anchor=(1, 1),
        ncols=len(legend), frameon=False,
    )  # fmt: skip
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        points = sorted((row["ranks"], row["images_per_second"]) for row in rows if row["schedule"] == schedule)
        below.plot(*zip(*points, strict=True), "o-", color=COLORS[SCHEDULES.index(schedule)], label=schedule)
    below.set(title="Throughput by number of ranks", xlabel="ranks", ylabel="images/s", ylim=(0, None))
    below.set_xscale("log", base=2)
    below.set_xticks(sorted({row["ranks"] for row in rows}))
    below.xaxis.set_major_formatter("{x:g}")
    below.xaxis.set_minor_locator(NullLocator())
    below.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def draw_timeline(axes: Axes, events: Sequence[Event], title: str, until: float) -> None:
    """Draw what each rank does in the first `until` seconds: a row per rank, a color per batch.

    The backward pass, the update and other later parts of a batch are paler than its forward pass.
    """
    unit, word = (1.0, "seconds") if until >= 2 else (1e-3, "milliseconds") if until >= 2e-3 else (1e-6, "microseconds")
    ranks = 1 + max(event.rank for event in events)
    for rank in range(ranks):
        shown = [event for event in events if event.rank == rank and event.start < until]
        spans = [(event.start / unit, (min(event.end, until) - event.start) / unit) for event in shown]
        axes.broken_barh(spans, (rank - 0.42, 0.84), facecolors=[color(event.batch, event.kind) for event in shown])
    axes.set(title=title, xlabel=word, ylabel="rank", xlim=(0, until / unit), ylim=(ranks - 0.5, -0.5))
    axes.yaxis.set_major_locator(MaxNLocator(min(ranks, 8), integer=True))
    axes.grid(axis="y", visible=False)


def color(batch: int, kind: str) -> tuple[float, ...]:
    """Return the color of an event as red, green and blue."""
    if kind not in PALER:
        return to_rgb(OTHER)
    return tuple(1 - (1 - channel) * (1 - PALER[kind]) for channel in to_rgb(COLORS[batch % len(COLORS)]))
