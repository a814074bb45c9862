"""The picture of `simulate.py`: simulated pipelines on one time axis, and the throughput of all."""

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from bench.pipeline.simulator import SCHEDULES, Event
from sid_trainer.report.figures import COLOURS, STYLE, as_png
from sid_trainer.report.pipeline_figures import MESSAGES, colour, draw_pipeline

LINES = dict(zip(SCHEDULES, (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]), strict=True))


@matplotlib.rc_context(STYLE)
def draw_outlook(pipelines: Sequence[tuple[str, Sequence[Event]]], until: float, rows: Sequence[dict]) -> bytes:
    """Draw simulated pipelines below one another up to the second `until`, then throughput against ranks, as PNG.

    pipelines: title and events of each. rows: dicts with schedule, ranks and images_per_second.
    """
    ranks = 1 + max(event.rank for _, events in pipelines for event in events)
    each = min(0.6 + 0.22 * ranks, 4.5)
    figure = Figure(figsize=(13, (each + 0.4) * len(pipelines) + 4.2), layout="constrained")
    every = figure.subplots(len(pipelines) + 1, 1, height_ratios=[each] * len(pipelines) + [3.6])
    for axes, (title, events) in zip(every, pipelines, strict=False):
        draw_pipeline(axes, events, title, until=until)
        if axes is not every[len(pipelines) - 1]:
            axes.set_xlabel("")
    kinds = ("forward", "backward", "weights", "update")
    seen = {event.kind for _, events in pipelines for event in events}
    handles = [Patch(color=colour(0, kind)) for kind in kinds if kind in seen]
    words = {"weights": "backward of the weights"}
    named = [words.get(kind, kind) for kind in kinds if kind in seen]
    if seen - set(kinds):
        handles, named = [*handles, Patch(color=MESSAGES)], [*named, "messages, loading"]
    every[0].legend(handles, named, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(named), frameon=False)
    below = every[-1]
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        points = sorted((row["ranks"], row["images_per_second"]) for row in rows if row["schedule"] == schedule)
        below.plot(*zip(*points, strict=True), "o-", color=LINES[schedule], label=schedule, markersize=4.5)
    below.set(title="Throughput by number of ranks", xlabel="ranks", ylabel="images/s", ylim=(0, None))
    below.set_xscale("log", base=2)
    below.set_xticks(sorted({row["ranks"] for row in rows}))
    below.xaxis.set_major_formatter("{x:g}")
    below.xaxis.set_minor_locator(NullLocator())
    below.legend(frameon=False)
    return as_png(figure)
