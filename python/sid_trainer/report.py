"""The picture of a run: accuracy and KL(y || p_i) by stage, and by epoch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomically


def read_run(folder: Path) -> tuple[list[dict], dict]:
    """The lines of a run's metrics.jsonl, and its config.json. Raises ValueError, in one line, where they are not."""

    def read(file: Path, parse):
        try:
            return parse(file.read_text())
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{file}: not what a run writes ({error})") from error

    rows = read(folder / "metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()])
    config = read(folder / "config.json", json.loads)
    needed = {"epoch", "train_loss", "test_accuracy", "stage_accuracy", "stage_kl"}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(f"{folder / 'metrics.jsonl'}: holds no whole epoch")
    if not isinstance(config, dict) or not {"method", "alpha", "classes"} <= config.keys():
        raise ValueError(f"{folder / 'config.json'}: not what a run writes")
    return rows, config


def ideal_kl(alpha: float, num_classes: int, depth: int) -> list[float]:
    """KL(y || p_i) of the ideal cascade, every stage at its minimum: p_i = (1 - r) y + r u with r = (1 - alpha)^i."""
    return [-math.log1p(-((1 - alpha) ** i) * (1 - 1 / num_classes)) for i in range(1, depth + 1)]


def draw_run(rows: Sequence[dict], file: Path, title: str = "", ideal: Sequence[float] | None = None) -> None:
    """Write a PNG: above, accuracy and KL against the stage, one line an epoch; below, both and the loss by epoch.

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
    small = {"markersize": 4}
    style = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, ((by_stage, kl_by_stage), (by_epoch, loss_by_epoch)) = plt.subplots(
            2, 2, figsize=(10, 7.2), layout="constrained"
        )
        for row in rows:
            look = {"color": colours(shade(row["epoch"])), "marker": "o", "markersize": 3.5, "linewidth": 1.6}
            by_stage.plot(stages, row["stage_accuracy"], **look)
            kl_by_stage.plot(stages, row["stage_kl"], **look)
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
            bar = figure.colorbar(scale, ax=[by_stage, kl_by_stage], label="epoch", pad=0.01)
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
        for axes in (by_stage, by_epoch):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        for axes in figure.axes[:4]:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title)
        write_atomically(file, lambda out: figure.savefig(out, format="png", dpi=130))
        plt.close(figure)
