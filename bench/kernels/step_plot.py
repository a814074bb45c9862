"""Draw a file of `step_report.py` as the README's picture: relative time and memory of both operations."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from bench.kernels import cascade_contenders as cascade
from bench.kernels import head_contenders as head
from bench.lib.plot import bars, where

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHER = "#b5541c", "#e0903a"
# The contenders that are drawn for each operation, and their colors: ours first, then the others.
DRAWN = {
    "cascade": {
        cascade.TRAINER: OURS,
        cascade.CAPTURED: OTHER,
        cascade.REFERENCE: "#9aa5b1",
        cascade.REFERENCE_COMPILED: "#2f6f9f",
        cascade.BP: "#bfa6d9",
        cascade.BP_FUSED: "#7a5ea8",
        cascade.BP_COMPILED: "#4b3573",
    },
    "head": {
        head.DIRECT: OURS,
        head.EAGER: "#9aa5b1",
        head.COLLAPSED: "#6b7785",
        head.COMPILED_COLLAPSED: "#2f6f9f",
        head.LIGER: "#bfa6d9",
        head.LIGER_JSD: "#7a5ea8",
    },
}
TITLES = {"cascade": "One training step of a cascade, Adam included", "head": "A belief head: loss and all gradients"}


def draw(source: Path, out: Path) -> None:
    """Draw two panels for each operation: how many times longer the others take, and peak memory beyond the inputs."""
    filed = json.loads(source.read_text())
    for step in filed.get("steps", ()):  # a file of gpu.py contains one of step_report.py
        if step["name"] == "steps":
            filed = step.get("result", {"results": []})
    results = {name: [e for e in filed["results"] if e["operation"] == name] for name in DRAWN}
    results = {name: entries for name, entries in results.items() if entries}
    rows = [[f"{name} {quantity}"] for name in results for quantity in ("time", "memory")]
    figure, panels = plt.subplot_mosaic(rows, figsize=(11.0, 2.6 * len(rows) + 0.4))
    for operation, entries in results.items():
        left, right = panels[f"{operation} time"], panels[f"{operation} memory"]
        labels = [_label(operation, entry["size"]) for entry in entries]
        shown = {x: c for x, c in DRAWN[operation].items() if any(x in e["contenders"] for e in entries)}
        base, *others = shown
        times = {x: [e["ratios"].get(base, {}).get(x, {}).get("of_medians") for e in entries] for x in others}
        bars(left, times, shown, labels, "{:.1f}".format, 1.0)
        _log(left, times, "×")
        left.axhline(1.0, color=OURS, linewidth=1.5)
        left.set_title(f"{TITLES[operation]}: times faster {base} is than", fontsize=9, loc="left")
        memory = {x: [_megabytes(e["contenders"].get(x)) for e in entries] for x in shown}
        memory = {x: values for x, values in memory.items() if any(values)}
        bars(right, memory, shown, labels, lambda x: f"{x:.0f}" if x >= 10 else f"{x:.1f}")
        _log(right, memory, " MB")
        what = {"cascade": "features, parameters and optimizer states", "head": "inputs"}[operation]
        right.set_title(f"Peak memory beyond {what}, gradients included", fontsize=9, loc="left")
        for panel in (left, right):
            panel.margins(x=0.02)
            panel.legend(frameon=False, fontsize=7.5, ncols=6, loc="upper left")
    figure.suptitle(where(filed), fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _label(operation: str, size: list) -> str:
    if operation == "cascade":
        return f"{size[4]} classes, {size[0]} stages"
    rows, width, classes, dtype, prior = size
    half = "" if dtype == "float32" else f"\n{dtype}"
    return f"prior {prior}\n{rows}×{width}×{classes}{half}"


def _megabytes(contender: dict | None) -> float | None:
    return contender["peak_bytes"] / 1e6 if contender and contender["peak_bytes"] else None


def _log(panel, values: dict[str, list[float | None]], unit: str) -> None:
    """Make the vertical axis logarithmic, with room for the legend above the bars."""
    shown = [value for row in values.values() for value in row if value] or [1.0]
    low, high = (min(1.0, *shown) / 1.4 if unit == "×" else 0.6 * min(shown)), max(shown)
    panel.set_yscale("log")
    panel.set_ylim(low, high * 1.3 * (high / low) ** 0.3)
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}{unit}"))
    panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
