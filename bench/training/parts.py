"""Measure what the parts of an epoch take on one thread, and a step of SID against one of backpropagation.

    OMP_NUM_THREADS=1 python bench/training/parts.py --data PATH --out bench/results/parts.json

Both train stagewise networks on CIFAR-10 as `sid train` does (Adam, float32, crop and flip) in turns. Times are of
the processor, not of the clock, so that other programs on the machine count less. An epoch is loading (batches, crop,
flip, normalization), steps and the rest (losses, correct answers, schedulers). A profile of one step divides its
time into the matrix library, other operators (pooling, norms, ReLU, sums), the optimizer, and what remains: Python, the
dispatch of operators, autograd, and the kernels of this package. The profiler slows what remains more than the others.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.lib.record import header, write_json
from sid_trainer.runs.build import make_trainer
from sid_trainer.training.config import run_config
from sid_trainer.training.operations import training_operations
from sid_trainer.training.trainer import Trainer

NETWORKS = {"simple_cnn": 64, "vgg11": 32, "resnet18": 16, "vit_tiny": 32, "mlp": 128}  # batch size by architecture
DEPTHS = {"mlp": 16}
STEPS = 4  # of an epoch
MATRIX = ("conv", "addmm", "mm", "bmm", "baddbmm", "attention", "linear")
OPTIMIZER = ("_fused_adam", "_foreach")


class Run:
    """A trainer whose loading and steps are timed."""

    def __init__(self, arch: str, method: str, args: argparse.Namespace):
        images = STEPS * NETWORKS[arch]
        config = run_config(
            dataset="cifar10", data=args.data, cache=args.cache, train_images=images, arch=arch,
            layout="stagewise", depth=DEPTHS.get(arch), method=method, device="cpu", batch_size=NETWORKS[arch],
            epochs=args.rounds + 2, optimizer="adam", lr=1e-3, weight_decay=0.0, lr_schedule="constant",
        )  # fmt: skip
        self.trainer: Trainer = make_trainer(config, quiet=True)
        self.steps: list[float] = []
        self.loading, self.epochs = 0.0, []
        strategy = self.trainer.strategy
        self.batches, self.step = strategy.train_batches, strategy.run_step
        strategy.train_batches, strategy.run_step = self.train_batches, self.run_step

    def train_batches(self, *position: int) -> Iterator[Any]:
        batches, start = self.batches(*position), time.process_time()
        for batch in batches:
            self.loading += time.process_time() - start
            yield batch
            start = time.process_time()

    def run_step(self, *batch: Any) -> Any:
        start = time.process_time()
        result = self.step(*batch)
        self.steps.append(time.process_time() - start)
        return result

    def train_epoch(self) -> None:
        """Train an epoch; its seconds for loading, steps and the rest are appended to `epochs`."""
        self.loading, before, start = 0.0, len(self.steps), time.process_time()
        self.trainer.train_epoch()
        steps, whole = sum(self.steps[before:]), time.process_time() - start
        self.epochs.append({"loading": self.loading, "steps": steps, "rest": whole - steps - self.loading})
        self.trainer.epoch, self.trainer.step, self.trainer.sums = self.trainer.epoch + 1, 0, {}


def profile_step(run: Run) -> dict[str, float]:
    """Return the share of each part in the time of a step."""
    batch = next(iter(run.batches(1, 0)))
    run.step(*batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        run.step(*batch)
        seconds = time.perf_counter() - start
    parts = dict.fromkeys(("matrix library", "optimizer", "other operators"), 0.0)
    for row in profiled.key_averages():
        name = row.key.removeprefix("aten::")
        if row.key.startswith("aten::") and not name.startswith("_foreach"):
            matrix = any(word in name for word in MATRIX) and "_fused" not in name
            part = "matrix library" if matrix else "optimizer" if name.startswith(OPTIMIZER) else "other operators"
            parts[part] += row.self_cpu_time_total / 1e6 / seconds
        elif name.startswith(OPTIMIZER):
            parts["optimizer"] += row.cpu_time_total / 1e6 / seconds
    return parts | {"Python, dispatch, autograd, own kernels": 1 - sum(parts.values())}


def measure(arch: str, args: argparse.Namespace) -> dict:
    """Return the row of an architecture."""
    runs = {method: Run(arch, method, args) for method in ("sid", "bp")}
    operations = {name: training_operations(run.trainer.network, name, (3, 32, 32)) for name, run in runs.items()}
    for round_ in range(args.rounds + 1):
        for run in runs.values() if round_ % 2 else reversed(runs.values()):
            run.train_epoch()
    steps = {name: statistics.median(run.steps[STEPS:]) for name, run in runs.items()}  # the first epoch warms up
    epochs = runs["sid"].epochs[1:]
    whole = statistics.median(sum(epoch.values()) for epoch in epochs)
    return {
        "arch": arch,
        "batch_size": NETWORKS[arch],
        "step_seconds": steps,
        "sid_over_bp": steps["sid"] / steps["bp"],
        "operations_sid_over_bp": operations["sid"] / operations["bp"],
        "epoch_shares": {part: statistics.median(epoch[part] for epoch in epochs) / whole for part in epochs[0]},
        "step_shares": {name: profile_step(run) for name, run in runs.items()},
    }


def table(rows: list[dict]) -> str:
    """Return the rows of all architectures as text."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['arch']:10} batch {row['batch_size']:3}  step SID {row['step_seconds']['sid'] * 1e3:7.1f} ms,"
            f" over BP {row['sid_over_bp']:.2f} (operations {row['operations_sid_over_bp']:.2f})"
        )
        shares = {"epoch": row["epoch_shares"]} | {f"{name} step": part for name, part in row["step_shares"].items()}
        for name, parts in shares.items():
            lines.append(f"  {name:9}" + ", ".join(f"{part} {share:.1%}" for part, share in parts.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="CIFAR-10: an image folder, or the root of cifar-10-batches-py")
    add("--cache", help="folder for the decoded images")
    add("--archs", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="(default: all)")
    add("--rounds", type=int, default=5, help="timed epochs of each method (default: 5)")
    add("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    rows = []
    for arch in args.archs:
        rows.append(measure(arch, args))
        print(table(rows[-1:]), flush=True)
        filed = header("parts of an epoch on one thread, and a step of SID against one of backpropagation")
        write_json(args.out, filed | {"rows": rows})


if __name__ == "__main__":
    main()
