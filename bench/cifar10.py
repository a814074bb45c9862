"""Train the reference network on CIFAR-10 (an image folder) three ways at once, and compare images/s and accuracy.

    python bench/cifar10.py --data PATH --epochs 3 --out bench/results/cifar10.json

`sid` and `sid-bfloat16` are this library's step. `reference` is the same training written as the public reference code
does: two forward passes, the loss of every stage in plain PyTorch, one backward over the sum, ReLU before pooling,
contiguous (NCHW) tensors, PyTorch's default Adam. All start from the same parameters and see the same batches; they
take turns by a few steps within one process, so that whatever else the machine does meets all alike. A ratio is the
median over rounds of images/s against the reference's in the same round. Evaluation is not timed.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam

from sid_trainer import SIDNetwork, TrainConfig, Trainer, build_network
from sid_trainer.data import Split, load_data
from sid_trainer.files import write_atomically
from sid_trainer.memory import keep_freed_memory
from sid_trainer.step import STEPS

METHODS = {
    "sid": {"method": "sid"},
    "reference": {"method": "reference", "channels_last": False},
    "sid-bfloat16": {"method": "sid", "dtype": "bfloat16"},
}


def as_in_the_reference(network: SIDNetwork) -> SIDNetwork:
    """The same parameters, each ReLU before its pooling and out of place."""
    layers = []
    for layer in network.extractor:
        if isinstance(layer, nn.ReLU):
            place = len(layers) - isinstance(layers[-1], nn.MaxPool2d)
            layers.insert(place, nn.ReLU())
        else:
            layers.append(layer)
    network.extractor = nn.Sequential(*layers)
    for stage in network.stages:
        stage.head.relu = nn.ReLU()
    return network


def make_trainer(name: str, data, args: argparse.Namespace) -> Trainer:
    torch.manual_seed(args.seed)
    network = build_network("simple_cnn", layout="shared", num_classes=len(data.classes), depth=args.depth)
    config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed, **METHODS[name])
    if name == "reference":
        network = as_in_the_reference(network)
    trainer = Trainer(network, data, config, quiet=True)
    if name == "reference":
        trainer.optimizers = [Adam(m.parameters(), lr=args.lr) for m in (network.extractor, *network.stages)]
    return trainer


def turns(trainer: Trainer, chunk: int, limit: int | None):
    """One epoch, `chunk` steps at each `next`: yields images/s and the mean loss of those steps."""
    batches = trainer.train_batches.shuffled(trainer.generator, trainer.data.crop, trainer.data.flip)
    batches, step, config = islice(batches, limit), STEPS[trainer.config.method], trainer.config
    trainer.network.train()
    while True:
        seen, loss, start = 0, 0.0, time.perf_counter()
        for inputs, targets in islice(batches, chunk):
            if not config.channels_last:
                inputs = inputs.contiguous()
            result = step(trainer.network, inputs, targets, config.alpha, trainer.optimizers, dtype=trainer.dtype)
            seen, loss = seen + len(targets), loss + result.stage_loss.mean() * len(targets)
        if not seen:
            return
        loss = float(loss) / seen  # waits for the device
        yield seen / (time.perf_counter() - start), loss


def commit() -> str | None:
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "") or None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder: train/<class>/..., test/<class>/...")
    parser.add_argument("--cache", help="folder for the decoded images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=20, help="steps of one turn")
    parser.add_argument("--steps", type=int, help="end each epoch after this many (to try the script)")
    parser.add_argument("--test-images", type=int, help="test on this many only (to try the script)")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="the allocator setting `sid train` uses, for all"
    )
    parser.add_argument("--out", type=Path, default=Path("cifar10.json"), help="the JSON file to write")
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"{args.out.parent}: no such folder")
    if args.keep_freed_memory:
        keep_freed_memory()

    data = load_data("folder", args.data, cache=args.cache)
    if args.test_images:
        data = data._replace(test=Split(data.test.images[:: len(data.test.labels) // args.test_images],
                                        data.test.labels[:: len(data.test.labels) // args.test_images]))  # fmt: skip
    trainers = {name: make_trainer(name, data, args) for name in args.methods}
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    epochs: dict[str, list[dict]] = {name: [] for name in trainers}
    began = time.time()
    for epoch in range(1, args.epochs + 1):
        running = {name: turns(trainer, args.chunk, args.steps) for name, trainer in trainers.items()}
        losses = {name: [] for name in trainers}
        for round_of_turns in zip(*running.values(), strict=True):
            for name, (speed, loss) in zip(running, round_of_turns, strict=True):
                speeds[name].append(speed)
                losses[name].append(loss)
        for name, trainer in trainers.items():
            row = {"epoch": epoch, "train_loss": statistics.mean(losses[name]), **trainer.evaluate()}
            epochs[name].append(row)
            print(
                f"epoch {epoch}  {name:13s} loss {row['train_loss']:.4f}  test accuracy {row['test_accuracy']:.2%}"
                f"  {statistics.median(speeds[name]):7.1f} images/s  ({time.time() - began:.0f} s in all)",
                flush=True,
            )

    base = speeds.get("reference")
    summary = {
        name: {
            "images_per_second": statistics.median(speeds[name]),
            "times_reference": base and statistics.median(a / b for a, b in zip(speeds[name], base, strict=True)),
            "test_accuracy": [row["test_accuracy"] for row in epochs[name]],
            "epochs": epochs[name],
            "images_per_second_by_turn": [round(speed, 2) for speed in speeds[name]],
        }
        for name in trainers
    }
    print(f"\n{'':13s} images/s   x reference   test accuracy by epoch")
    for name, row in summary.items():
        ratio = f"{row['times_reference']:.2f}" if base else "-"
        print(
            f"{name:13s} {row['images_per_second']:8.1f} {ratio:>13s}   ", *(f"{a:.2%}" for a in row["test_accuracy"])
        )
    record = {
        "what": "reference network on CIFAR-10, images/s and accuracy of the whole training step",
        "command": shlex.join([Path(sys.executable).name, "bench/cifar10.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "device": str(next(iter(trainers.values())).device),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {key: value for key, value in vars(args).items() if key not in ("data", "cache", "out")},
        "images": {"train": len(data.train.labels), "test": len(data.test.labels)},
        "methods": summary,
    }
    write_atomically(args.out, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
