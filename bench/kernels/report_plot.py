"""Draw files of `report.py` as the README's picture: speed-up over each alternative and share of clone, by size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.kernels.contenders import CLONE, DIRECT, FUSED
from bench.lib.plot import bars, where

# The alternatives that are drawn, and their colors; "compiled four-op" is only in the table.
DRAWN = {
    "eager four-op": "#9aa5b1",
    "eager collapsed": "#6b7785",
    "compiled collapsed": "#2f6f9f",
    "liger kl_div": "#7a5ea8",
}
OURS = {FUSED: "#e0903a", DIRECT: "#b5541c"}


def draw(sources: Sequence[Path], out: Path) -> None:
    """Draw a row of panels for each file and dtype. Small sizes on a GPU show replayed graphs if the file has them."""
    rows = []
    for source in sources:
        filed = json.loads(source.read_text())
        for step in filed.get("steps", ()):  # a file of gpu.py contains one of report.py
            if step["name"] == "benchmark":
                filed = step.get("result", {"results": []})
        for dtype in ("float32", "bfloat16"):
            entries = [entry for entry in _chosen(filed["results"]) if entry["dtype"] == dtype]
            if entries:
                entries.sort(key=lambda e: e["rows"] * e["classes"])
                rows.append((f"{dtype}, {where(filed)}" if len(sources) > 1 else dtype, entries))
    size = (max(9.5, 1.9 * max(len(entries) for _, entries in rows) + 2.5), 2.9 * len(rows) + 0.9)
    figure, panels = plt.subplots(len(rows), 2, figsize=size, squeeze=False, width_ratios=(1.5, 1))
    for (left, right), (title, entries) in zip(panels, rows, strict=True):
        labels = [f"{e['rows']}×{e['classes']}" + ("\n(graph)" if e["launch"] == "graph" else "") for e in entries]
        drawn = {x: color for x, color in DRAWN.items() if any(x in e["ratios"].get(FUSED, {}) for e in entries)}
        speedups = {x: [e["ratios"].get(FUSED, {}).get(x, {}).get("of_medians") for e in entries] for x in drawn}
        bars(left, speedups, drawn, labels, "{:.1f}".format)
        left.axhline(1.0, color="black", linewidth=0.8, zorder=0)
        left.set_yscale("log")
        shown = [value for values in speedups.values() for value in values if value] or [1.0]
        left.set_ylim(0.8 * min(1.0, *shown), 1.6 * max(2.0, *shown))
        left.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}×"))
        left.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        left.set_title(f"{title}: times faster fused_local_loss is than", fontsize=10, loc="left")
        shares = {x: [e["contenders"].get(x, {}).get("share_of_clone") for e in entries] for x in OURS}
        bars(right, shares, OURS, labels, "{:.0%}".format)
        right.axhline(1.0, color="black", linewidth=0.8, zorder=0)
        right.set_ylim(0, 1.15 * max(1.0, *(value for values in shares.values() for value in values if value)))
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        right.set_title(f"share of the bandwidth of {CLONE}", fontsize=10, loc="left")
    for column, place in ((panels[:, 0], 0.32), (panels[:, 1], 0.8)):  # a legend under each column
        handles = {name: bar for panel in column for bar, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        options = {"fontsize": 8, "ncols": len(handles), "frameon": False, "bbox_to_anchor": (place, 0.0)}
        figure.legend(handles.values(), handles, loc="lower center", **options)
    machine = f"; {where(filed)}" if len(sources) == 1 else ""
    figure.suptitle(f"Loss, belief and gradient of the logits, at rows×classes{machine}", fontsize=10)
    figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _chosen(results: list[dict]) -> list[dict]:
    """Choose one entry per size and dtype: that of replayed graphs if there is one, otherwise ordinary calls."""
    chosen = {(e["rows"], e["classes"], e["dtype"]): e for e in results if e["launch"] == "calls"}
    for entry in results:
        if entry["launch"] == "graph" and FUSED in entry["contenders"]:
            chosen[entry["rows"], entry["classes"], entry["dtype"]] = entry
    return list(chosen.values())
