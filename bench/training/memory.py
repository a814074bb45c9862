"""Measure the memory of a training step by method, depth and batch size, for shared and stagewise networks.

    python bench/training/memory.py --out bench/results/memory.json
    python bench/training/memory.py --plot bench/results/memory.json --out docs/images/memory.png

The steps run on the CPU in float32, on images of 3 x 32 x 32 with 10 classes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.lib.footprint import allocated_peak
from sid_trainer import build_network
from sid_trainer.files import write_atomically
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import BACKPROPAGATED, METHODS, cascade_bytes, make_step
from sid_trainer.training.memory import SavedBytes

NETWORKS = (("shared", "simple_cnn"), ("shared", "mlp"), ("stagewise", "mlp"))  # networks of any depth
COLUMNS = {
    "saved_bytes": "held for backward (by autograd, or by the fused cascade)",
    "peak_bytes": "allocated at once, beyond parameters and gradients",
}
UNFUSED = "sid, unfused"  # runs equal stages one by one, so that the activations of only one are held at a time


def measure(
    methods: Sequence[str], depths: Sequence[int], batch_sizes: Sequence[int], quiet: bool = False
) -> list[dict]:
    """Return a row for each network, method, depth and batch size. Raises ValueError for sizes below 1."""
    from tqdm import tqdm

    for name, values in (("depths", depths), ("batch_sizes", batch_sizes)):
        if min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, not {min(values)}")
    steps = [(method, True) for method in methods] + [("sid", False)] * ("sid" in methods)
    cells = [
        cell for cell in product(NETWORKS, steps, depths, batch_sizes) if cell[1][1] or cell[0][0] == "shared"
    ]  # stagewise stages differ, so they are never fused
    rows = []
    bar = tqdm(cells, unit=" steps", leave=False, disable=True if quiet else None)
    for (layout, arch), (method, fused), depth, size in bar:
        plain = layout == "stagewise" and method in BACKPROPAGATED
        network = build_network(arch, layout, depth=depth, plain=plain).to(memory_format=torch.channels_last)
        step = make_step(method, network, (), StepOptions(fused=fused))
        inputs, targets = torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))
        inputs = inputs.to(memory_format=torch.channels_last)
        with SavedBytes(network.parameters()) as saved:
            step(inputs, targets)
        held = saved.peak + cascade_bytes(network, method, size, StepOptions(fused=fused))
        peak = allocated_peak(lambda step=step, x=inputs, y=targets: step(x, y), warm=False)
        name = method if fused else UNFUSED
        row = {"layout": layout, "arch": arch, "method": name, "depth": depth, "batch_size": size}
        rows.append(row | {"saved_bytes": held, "peak_bytes": peak})
    return rows


def write(rows: Sequence[dict], file: Path) -> None:
    """Write the measured rows as JSON."""
    record = {
        "what": "bytes of a training step: " + ", ".join(COLUMNS.values()),
        "torch": str(torch.__version__),
        "rows": rows,
    }
    write_atomically(file, lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))


def tables(rows: Sequence[dict]) -> str:
    """Return tables of MiB by method and depth, one for each network, batch size and column."""
    cells = {((row["layout"], row["arch"]), row["method"], row["depth"], row["batch_size"]): row for row in rows}
    networks, methods, depths, sizes = (list(dict.fromkeys(key[i] for key in cells)) for i in range(4))
    lines = []
    for network, size, (column, what) in product(networks, sizes, COLUMNS.items()):
        lines.append(f"\n{' '.join(network)}, batch {size}, MiB {what}")
        lines.append(f"{'depth':>18s}" + "".join(f"{depth:10d}" for depth in depths))
        for method in (m for m in methods if (network, m, depths[0], size) in cells):
            numbers = (cells[network, method, depth, size][column] / 2**20 for depth in depths)
            lines.append(f"{method:>18s}" + "".join(f"{number:10.2f}" for number in numbers))
    return "\n".join(lines)


def draw(rows: Sequence[dict], file: Path) -> None:
    """Draw bytes held for backward against depth and batch size, each at the most common value of the other."""
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure

    table = pd.DataFrame(rows).assign(MiB=lambda table: table["saved_bytes"] / 2**20)
    networks, methods = list(table.groupby(["arch", "layout"], sort=False)), list(table["method"].unique())
    figure = Figure(figsize=(11.5, 3.9 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for ((arch, layout), group), pair in zip(networks, panels, strict=True):
        for axes, x, fixed in zip(pair, ("depth", "batch_size"), ("batch_size", "depth"), strict=True):
            value = group[fixed].mode().max()
            sns.lineplot(
                group[group[fixed] == value], x=x, y="MiB", hue="method", hue_order=methods, style="method",
                style_order=methods, markers=True, palette="colorblind", ax=axes, legend=axes is pair[1],
            )  # fmt: skip
            axes.set(title=f"{arch}, {layout}: {fixed} {value}".replace("_size", " size"), xlabel=x.replace("_", " "))
            axes.set_ylabel("MiB held for backward")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(group[x].unique()))
            axes.set_yscale("log", base=2)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        sns.move_legend(pair[1], "upper left", bbox_to_anchor=(1, 1), title=None)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    add("--depths", nargs="+", type=int, default=[4, 8, 16, 32], help="(default: 4 8 16 32)")
    add("--batch-sizes", nargs="+", type=int, default=[32, 128, 512], help="(default: 32 128 512)")
    add("--out", metavar="FILE", type=Path, default=Path("memory.json"), help="(default: memory.json)")
    add("--plot", metavar="JSON", type=Path, help="measure nothing, draw the rows of this file as the picture --out")
    args = parser.parse_args(arguments)
    try:
        if args.plot:
            draw(json.loads(args.plot.read_text())["rows"], args.out)
            return
        rows = measure(args.methods, args.depths, args.batch_sizes)
        write(rows, args.out)
    except (LookupError, TypeError, ValueError, OSError) as error:
        parser.exit(2, f"memory.py: error: {error}\n")
    print(tables(rows))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
