"""Pictures of pipelines: time across, ranks down, one colour a batch."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .figures import COLOURS, OTHERS, STYLE, as_png, plain

BATCHES = (*COLOURS[:3], COLOURS[4], OTHERS[0], COLOURS[5], OTHERS[2])  # in turn; without black and grey
PALER = {"forward": 0.0, "work": 0.0, "backward": 0.45, "weights": 0.62, "update": 0.78}  # towards white
MESSAGES = "#555555"  # also loading, and whatever else is not a stage's own work


def draw_pipeline(
    axes: Axes, events: Sequence[tuple], title: str, *, until: float | None = None,
    names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Draw (rank, batch, kind, start, end) in seconds, up to `until`, with the ranks' `names` beside their rows.

    Of a batch's colour, full: forward ("forward"), or all that was done to it ("work"); paler: backward, update.
    """
    until = max(event[4] for event in events) if until is None else until
    unit, word = (1.0, "seconds") if until >= 2 else (1e-3, "milliseconds") if until >= 2e-3 else (1e-6, "microseconds")
    ranks = 1 + max(event[0] for event in events)
    for rank in range(ranks):
        own = [event for event in events if event[0] == rank and event[3] < until]
        spans = [(start / unit, (min(end, until) - start) / unit) for _, _, _, start, end in own]
        axes.broken_barh(spans, (rank - 0.42, 0.84), facecolors=[colour(batch, kind) for _, batch, kind, *_ in own])
    axes.set(title=plain(title), xlabel=word, xlim=(0, until / unit), ylim=(ranks - 0.5, -0.5))
    if names:
        axes.set_yticks(range(ranks), [plain(name) for name in names])
    else:
        axes.set_ylabel("rank")
        axes.yaxis.set_major_locator(MaxNLocator(min(ranks, 8), integer=True))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", visible=False)


def colour(batch: int, kind: str) -> tuple[float, ...]:
    paler = PALER.get(kind)
    return to_rgb(MESSAGES) if paler is None else tuple(
        (1 - paler) * np.array(to_rgb(BATCHES[batch % len(BATCHES)])) + paler
    )  # fmt: skip


@matplotlib.rc_context(STYLE)
def draw_pipelines(runs: Sequence[tuple[str, dict]]) -> bytes:
    """Draw the first batches of the last epoch of each run (name, content of its pipeline.json); return a PNG."""
    heights = [0.9 + 0.42 * len(about["ranks"]) for _, about in runs]
    figure = Figure(figsize=(13, sum(heights) + 0.6 * len(runs)), layout="constrained")
    every = figure.subplots(len(runs), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, about) in zip(every, runs, strict=True):
        events = [
            (place, batch, "work", start, end)
            for place, one in enumerate(about["ranks"])
            for batch, (start, end) in enumerate(one["batches"])
        ]
        names = [f"rank {one['rank']}, {stages(one['stages'])}" for one in about["ranks"]]
        draw_pipeline(axes, events, f"{name}: {shares(about)}", names=names)
    return as_png(figure)


def stages(numbers: Sequence[int]) -> str:
    first, last = min(numbers), max(numbers)
    return f"stage {first}" if first == last else f"stages {first}–{last}"


def shares(about: dict) -> str:
    words = {"bubble": "idle {:.1%}", "predicted_bubble": "predicted {:.1%}", "imbalance": "imbalance {:.1%}"}
    return ", ".join(text.format(about[key]) for key, text in words.items() if about.get(key) is not None)
