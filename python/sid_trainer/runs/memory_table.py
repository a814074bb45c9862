"""What a training step holds, measured: by method, by depth and by batch size, in both layouts."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from ..files import write_atomically
from ..methods.common import StepOptions
from ..methods.factory import BACKPROPAGATED, cascade_bytes, make_step
from ..network.architectures import build_network
from ..training.memory import SavedBytes, allocated_peak

NETWORKS = (("shared", "simple_cnn"), ("shared", "mlp"), ("stagewise", "mlp"))  # those whose depth can be anything
COLUMNS = {
    "saved_bytes": "held for backward (by autograd, or by the fused cascade)",
    "peak_bytes": "allocated at once, beyond parameters and gradients",
}
BY_STAGE = "sid, unfused"  # one stage's activations at a time, where equal stages could be fused


def measure(
    methods: Sequence[str], depths: Sequence[int], batch_sizes: Sequence[int], quiet: bool = False
) -> list[dict]:
    """A row for each layout, method, depth and batch size: images of 3 x 32 x 32, 10 classes, float32, on the CPU."""
    from tqdm import tqdm

    for name, values in (("depths", depths), ("batch_sizes", batch_sizes)):
        if min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, not {min(values)}")
    steps = [(method, True) for method in methods] + [("sid", False)] * ("sid" in methods)
    cells = [
        cell for cell in product(NETWORKS, steps, depths, batch_sizes) if cell[1][1] or cell[0][0] == "shared"
    ]  # cut stages differ, so that they are never fused
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
        name = method if fused else BY_STAGE
        row = {"layout": layout, "arch": arch, "method": name, "depth": depth, "batch_size": size}
        rows.append(row | {"saved_bytes": held, "peak_bytes": peak})
    return rows


def write_memory(rows: Sequence[dict], file: Path) -> str:
    """Write the rows as JSON and return them as tables, MiB by method and depth for each network and batch size."""
    record = {
        "what": "bytes of a training step: " + ", ".join(COLUMNS.values()),
        "torch": str(torch.__version__),
        "rows": rows,
    }
    write_atomically(file, lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))
    found = {((row["layout"], row["arch"]), row["method"], row["depth"], row["batch_size"]): row for row in rows}
    networks, methods, depths, sizes = (list(dict.fromkeys(key[i] for key in found)) for i in range(4))
    lines = []
    for network, size, (column, what) in product(networks, sizes, COLUMNS.items()):
        lines.append(f"\n{' '.join(network)}, batch {size}, MiB {what}")
        lines.append(f"{'depth':>18s}" + "".join(f"{depth:10d}" for depth in depths))
        for method in (m for m in methods if (network, m, depths[0], size) in found):
            numbers = (found[network, method, depth, size][column] / 2**20 for depth in depths)
            lines.append(f"{method:>18s}" + "".join(f"{number:10.2f}" for number in numbers))
    return "\n".join(lines)
