"""Compare the loop around `network(inputs, targets).loss.backward()` with `sid_step`: time and memory of a step.

    python bench/training/loop.py --out bench/results/loop.json

Both train equal stagewise networks by SGD on images of 3 x 32 x 32 with 10 classes, in float32. They take turns.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.lib.footprint import allocated_peak
from bench.lib.record import header, write_json
from bench.lib.timing import Timer, interleave, ratios
from sid_trainer import build_network, sid_step

ARCHITECTURES = {"simple_cnn": 64, "resnet18": 16, "vit_tiny": 16, "mlp": 128}  # batch size by architecture


def make_steps(arch: str, batch_size: int) -> tuple[dict[str, Callable[[], None]], int]:
    """Return both steps, by `sid_step` and by the loop, on equal networks, and the bytes of the gradients."""
    inputs, targets = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    step_network, loop_network = (build_network(arch, "stagewise", image_size=(32, 32)) for _ in range(2))
    loop_network.load_state_dict(step_network.state_dict())
    modules = [list(module.parameters()) for module in step_network.local_modules]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3) if parameters else None for parameters in modules]
    optimizer = torch.optim.SGD(loop_network.parameters(), lr=1e-3)

    def step() -> None:
        sid_step(step_network, inputs, targets, 0.5, optimizers)

    def loop() -> None:
        optimizer.zero_grad()
        loop_network(inputs, targets).loss.backward()
        optimizer.step()

    gradients = sum(parameter.numel() * parameter.element_size() for parameter in loop_network.parameters())
    return {"sid_step": step, "loop": loop}, gradients


def measure(arch: str, batch_size: int, rounds: int, seconds: float) -> dict:
    """Return the row of an architecture: seconds and peak bytes of both steps, their ratio, and gradient bytes."""
    steps, gradients = make_steps(arch, batch_size)
    peaks = {name: allocated_peak(step) for name, step in steps.items()}
    times = interleave({name: Timer([step], "cpu") for name, step in steps.items()}, rounds, seconds)
    return {
        "arch": arch,
        "batch_size": batch_size,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": ratios(times, "sid_step")["loop"],
        "peak_bytes": peaks,
        "gradient_bytes": gradients,
    }


def table(rows: list[dict]) -> str:
    """Return the rows of all architectures as text."""
    lines = [f"{'network':12} {'sid_step':>10} {'loop':>10} {'ratio':>7}   peak MiB: sid_step, loop, gradients"]
    for row in rows:
        step, loop = (row["seconds"][name] * 1e3 for name in ("sid_step", "loop"))
        peaks = [row["peak_bytes"]["sid_step"], row["peak_bytes"]["loop"], row["gradient_bytes"]]
        memory = ", ".join(f"{value / 2**20:.1f}" for value in peaks)
        ratio = row["ratio"]["median_of_rounds"]
        lines.append(f"{row['arch']:12} {step:7.2f} ms {loop:7.2f} ms {ratio:7.3f}   {memory}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--archs", nargs="+", choices=tuple(ARCHITECTURES), default=list(ARCHITECTURES), help="(default: all)")
    add("--rounds", type=int, default=40, help="measurements of each step (default: 40)")
    add("--seconds", type=float, default=60.0, help="time limit for each network (default: 60)")
    add("--out", metavar="FILE", type=Path, default=Path("loop.json"), help="(default: loop.json)")
    args = parser.parse_args(arguments)
    rows = [measure(arch, ARCHITECTURES[arch], args.rounds, args.seconds) for arch in args.archs]
    write_json(args.out, header("step of the loop around a network's loss against sid_step") | {"rows": rows})
    print(table(rows))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
