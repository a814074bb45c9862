"""Draw grouped bars, and name the machine of a result file: what the benchmarks' pictures share."""

from __future__ import annotations

from collections.abc import Callable


def where(filed: dict) -> str:
    """Return the name of the GPU or processor that a result file was measured on."""
    machine = filed["machine"]
    if filed["settings"]["device"] == "cuda":
        return machine["gpu"]["name"]
    instructions = f" ({machine['instruction_set']})" if machine["instruction_set"] else ""
    return f"{machine['threads']} threads, {machine['processor']}{instructions}"


def bars(
    panel,
    values: dict[str, list[float | None]],
    colors: dict[str, str],
    labels: list[str],
    text: Callable[[float], str],
    base: float = 0.0,
) -> None:
    """Draw one group of bars per label, each bar from `base` to its value, which is written at its end.

    values: for each name, one value per label; None leaves a gap.
    """
    width = 0.8 / len(values)
    for i, (name, row) in enumerate(values.items()):
        places = [x - 0.4 + (i + 0.5) * width for x in range(len(row))]
        heights = [(base if value is None else value) - base for value in row]
        panel.bar(places, heights, width * 0.94, base, color=colors[name], label=name)
        for place, value in zip(places, row, strict=True):
            if value:
                offset, side = ((0, 2), "bottom") if value >= base else ((0, -3), "top")
                panel.annotate(
                    text(value), (place, value), offset, textcoords="offset points", ha="center", va=side, fontsize=7
                )
    panel.set_xticks(range(len(labels)), labels, fontsize=8)
    panel.tick_params(axis="y", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
