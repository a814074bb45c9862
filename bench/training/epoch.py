"""Images a second of whole CIFAR-10 epochs, loading included: what `sid train` runs against the public reference.

    python bench/training/epoch.py --data PATH --out bench/results/epoch.json

Every contender lives in a process of its own, which keeps its warmed state and sleeps until it is told to run an epoch
of the same class-balanced images; they take turns in an order that rotates from round to round, and the first round
is not counted. A figure is the median over rounds of images/s against the reference's in the same round. Evaluation
is not timed. The reference reads decoded pixels from memory too, as torchvision's CIFAR10 does: faster for it than the
files of an image folder.

What we expected before the first run, on 2 cores with AVX-512 and bfloat16 matrix units: float32 2.2 (2.0 to 2.4),
bfloat16 7.6 (7 to 8.5). With the same batches for all, the steps alone stood at 1.92 and 7.5 (306 images/s for the
reference); keeping freed memory, as the command does, is worth 14% in float32 and nothing in bfloat16; and the
reference's transforms, some 0.1 ms an image on processes that share the cores with its step, should cost it 2 to 4%.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

from bench.lib import record
from sid_trainer import SIDNetwork, sid_step
from sid_trainer.data.batches import Batches, pixel_statistics
from sid_trainer.data.datasets import Split
from sid_trainer.methods.common import StepOptions
from sid_trainer.options import Parser
from sid_trainer.runs.build import make_data, make_network, make_trainer
from sid_trainer.training.config import RunConfig, run_config
from sid_trainer.training.evaluation import evaluate, means

WORKERS = 2  # of the reference's DataLoader
Epoch, Accuracy = Callable[[], object], Callable[[], float]


def settings(args: argparse.Namespace, dtype: str = "float32") -> RunConfig:
    """Return the settings of `sid train --dataset cifar10 --layout shared` with the reference's recipe, Adam 1e-3."""
    return run_config(
        dataset="cifar10", data=args.data, cache=args.cache, train_images=args.images, layout="shared", device="cpu",
        epochs=args.rounds + 1, optimizer="adam", lr=1e-3, weight_decay=0.0, lr_schedule="constant", dtype=dtype,
    )  # fmt: skip


# ---------------------------------------------------------------- the contenders


def command(args: argparse.Namespace, dtype: str) -> tuple[Epoch, Accuracy]:
    torch.set_flush_denormal(True)
    trainer = make_trainer(settings(args, dtype), quiet=True)

    def epoch() -> None:
        trainer.train_epoch()
        trainer.epoch, trainer.step, trainer.sums = trainer.epoch + 1, 0, {}

    return epoch, lambda: means(*trainer.strategy.evaluate()["test"])["accuracy"][-1]


class InMemory(Dataset):
    """As torchvision's CIFAR10: the pixels in memory, at each index a PIL image, transformed."""

    def __init__(self, split: Split, transform: Callable):
        self.pixels, self.labels, self.transform = split.images.numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def reference(args: argparse.Namespace) -> tuple[Epoch, Accuracy]:
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

    run = replace(settings(args), fused=False)  # a module for each stage
    data = make_data(run)
    torch.manual_seed(run.seed)
    network = as_in_the_reference(make_network(run, len(data.classes), data.in_channels, data.image_size))
    optimizers = [Adam(module.parameters(), lr=run.lr) for module in (network.extractor, *network.stages)]
    mean, std = pixel_statistics(data.train.images)
    crop, normalize = RandomCrop(data.image_size, padding=data.crop), Normalize(mean / 255, std / 255)
    images = InMemory(data.train, Compose([crop, RandomHorizontalFlip(), ToTensor(), normalize]))
    loader = DataLoader(images, batch_size=run.batch_size, shuffle=True, num_workers=WORKERS)
    options = StepOptions(run.alpha)

    def epoch() -> float:
        network.train()
        loss = 0.0
        for inputs, targets in loader:
            result = sid_step(network, inputs, targets, run.alpha, optimizers, schedule="reference")
            loss += result.stage_loss.sum().item()
        return loss

    def accuracy() -> float:
        batches = Batches(data.test, run.batch_size, torch.device("cpu"), mean, std)
        return evaluate(network, batches.in_order(), options)["accuracy"][-1]

    return epoch, accuracy


def as_in_the_reference(network: SIDNetwork) -> SIDNetwork:
    """The same parameters, each ReLU before its pooling and out of place."""
    for i, block in enumerate(network.extractor[:-1]):
        convolution, *pooling = (layer for layer in block if not isinstance(layer, nn.ReLU))
        network.extractor[i] = nn.Sequential(convolution, nn.ReLU(), *pooling)
    for stage in network.stages:
        stage.head.relu = nn.ReLU()
    return network


BASE = "reference"
CONTENDERS = {
    BASE: (
        f"the public reference's loop: PIL transforms in {WORKERS} worker processes; a pass that caches the beliefs, a"
        " second one, one backward over the sum; NCHW; an ordinary Adam a module",
        reference,
    ),
    "sid train": ("what the command runs", lambda args: command(args, "float32")),
    "sid train, bfloat16": ("the same with --dtype bfloat16", lambda args: command(args, "bfloat16")),
}


# ---------------------------------------------------------------- processes that take turns


def serve(connection, name: str, args: argparse.Namespace, start_method: str) -> None:
    """In a contender's own process: answers "epoch" with its seconds and "accuracy"; a text is what went wrong.

    start_method: of a DataLoader's workers, the system's own. Spawned as this process is, they took seconds to start.
    """
    multiprocessing.set_start_method(start_method, force=True)
    try:
        epoch, accuracy = CONTENDERS[name][1](args)
        while True:
            asked, start = connection.recv(), time.perf_counter()
            if asked == "epoch":
                epoch()
                connection.send(time.perf_counter() - start)
            else:
                connection.send(accuracy())
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Contender:
    def __init__(self, name: str, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args, multiprocessing.get_start_method()))
        self.process.start()
        theirs.close()  # so that a process that died is noticed

    def ask(self, what: str) -> float:
        try:
            self.connection.send(what)
            found = self.connection.recv()
        except (EOFError, OSError):
            found = "its process ended"
        if isinstance(found, str):
            raise RuntimeError(f"{self.name}: {found}")
        return found

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """By contender: images/s by round, and the test accuracy after the last."""
    contenders = [Contender(name, args) for name in CONTENDERS]
    found = {name: {"images_per_second_by_round": [], "test_accuracy": None} for name in CONTENDERS}
    try:
        for round_ in range(args.rounds + 1):
            first = round_ % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                speed = args.images / contender.ask("epoch")
                print(f"round {round_ or 'to warm up'}  {contender.name:20s} {speed:8.1f} images/s", flush=True)
                if round_:
                    found[contender.name]["images_per_second_by_round"].append(speed)
        for contender in contenders:
            found[contender.name]["test_accuracy"] = contender.ask("accuracy")
    finally:
        for contender in contenders:
            contender.close()
    return found


def compared(found: dict[str, dict]) -> dict[str, dict]:
    """With medians, and ratios to the reference's images/s in the same round."""
    base = found[BASE]["images_per_second_by_round"]
    for name, row in found.items():
        speeds = row["images_per_second_by_round"]
        ratios = [a / b for a, b in zip(speeds, base, strict=True)]
        found[name] = {
            "what": CONTENDERS[name][0],
            "images_per_second": statistics.median(speeds),
            "times_reference": statistics.median(ratios),
            "times_reference_by_round": ratios,
            **row,
        }
    return found


def table(found: dict[str, dict]) -> str:
    lines = [f"{'':20s} {'images/s':>9s} {'x reference':>12s} {'lowest':>7s} {'highest':>8s} {'test accuracy':>14s}"]
    for name, row in found.items():
        ratios = row["times_reference_by_round"]
        lines.append(
            f"{name:20s} {row['images_per_second']:9.1f} {row['times_reference']:12.2f} {min(ratios):7.2f}"
            f" {max(ratios):8.2f} {row['test_accuracy']:14.2%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="CIFAR-10: an image folder, or the root of cifar-10-batches-py")
    add("--cache", help="folder for the decoded images")
    add("--images", type=int, default=10000, help="training images of an epoch (default: %(default)s)")
    add("--rounds", type=int, default=3, help="epochs of each that count (default: %(default)s)")
    add("--out", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    try:
        make_data(settings(args))  # also decodes the images, once for all
        found = compared(measure(args))
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(f"\n{table(found)}\n\nwritten: {args.out}")
    filed = record.header("images/s of whole CIFAR-10 epochs of the reference network, loading included")
    filed["settings"] = {"images": args.images, "rounds": args.rounds, "workers_of_the_reference": WORKERS}
    record.write_json(args.out, filed | {"contenders": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
