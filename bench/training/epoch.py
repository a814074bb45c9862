"""Measure the images per second of CIFAR-10 epochs, loading included: `sid train` against the public reference code.

    python bench/training/epoch.py --data PATH --out bench/results/epoch.json

Every contender runs in a process of its own, which sleeps until it is asked for an epoch. All train on the same
class-balanced images. They take turns, each round in another order, and the first round is not counted. The reported
ratio is the median over rounds of the contender's images/s divided by the reference's in the same round. Evaluation is
not timed. The reference also reads decoded pixels from memory, as torchvision's CIFAR10 does; that is faster than
reading the files of an image folder.

Expected before the first run, on 2 cores with AVX-512 and bfloat16 matrix units: 2.2 times the reference in float32
(2.0 to 2.4) and 7.6 times in bfloat16 (7 to 8.5). Three observations led to this. The steps alone, on equal batches,
are 1.92 and 7.5 times as fast as the reference's (306 images/s). Keeping freed memory, as `sid train` does, gains 14%
in float32 and nothing in bfloat16. The reference's transforms take about 0.1 ms per image in processes that share the
cores with its step, which should cost it 2 to 4%.
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
    """Return the settings of `sid train --dataset cifar10 --layout shared` with the reference's Adam and rate 1e-3."""
    return run_config(
        dataset="cifar10", data=args.data, cache=args.cache, train_images=args.images, layout="shared", device="cpu",
        epochs=args.rounds + 1, optimizer="adam", lr=1e-3, weight_decay=0.0, lr_schedule="constant", dtype=dtype,
    )  # fmt: skip


# ---------------------------------------------------------------- the contenders


def command(args: argparse.Namespace, dtype: str) -> tuple[Epoch, Accuracy]:
    """Return functions that train an epoch as `sid train` does, and that return the test accuracy."""
    torch.set_flush_denormal(True)
    trainer = make_trainer(settings(args, dtype), quiet=True)

    def epoch() -> None:
        trainer.train_epoch()
        trainer.epoch, trainer.step, trainer.sums = trainer.epoch + 1, 0, {}

    return epoch, lambda: means(*trainer.strategy.evaluate()["test"])["accuracy"][-1]


class InMemory(Dataset):
    """Keep the pixels in memory and return the transformed PIL image of an index, as torchvision's CIFAR10 does."""

    def __init__(self, split: Split, transform: Callable):
        self.pixels, self.labels, self.transform = split.images.numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def reference(args: argparse.Namespace) -> tuple[Epoch, Accuracy]:
    """Return functions that train an epoch as the public reference code does, and that return the test accuracy."""
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
    """Move each ReLU of the network before its pooling and make it out of place; the parameters stay."""
    for i, block in enumerate(network.extractor[:-1]):
        convolution, *pooling = (layer for layer in block if not isinstance(layer, nn.ReLU))
        network.extractor[i] = nn.Sequential(convolution, nn.ReLU(), *pooling)
    for stage in network.stages:
        stage.head.relu = nn.ReLU()
    return network


BASE = "reference"
CONTENDERS = {
    BASE: (
        f"the public reference's loop: PIL transforms in {WORKERS} worker processes; a forward pass that caches the"
        " beliefs, a second one for the losses, one backward pass of their sum; NCHW; an ordinary Adam for each module",
        reference,
    ),
    "sid train": ("what the command runs", lambda args: command(args, "float32")),
    "sid train, bfloat16": ("the same with --dtype bfloat16", lambda args: command(args, "bfloat16")),
}


# ---------------------------------------------------------------- processes that take turns


def serve(connection, name: str, args: argparse.Namespace, start_method: str) -> None:
    """Serve one contender in its own process: answer "epoch" by its seconds, "accuracy" by it, an error by its text.

    start_method: how a DataLoader starts its workers: by the system's default. Spawned, they take seconds to start.
    """
    multiprocessing.set_start_method(start_method, force=True)
    try:
        epoch, accuracy = CONTENDERS[name][1](args)
        while True:
            request, start = connection.recv(), time.perf_counter()
            if request == "epoch":
                epoch()
                connection.send(time.perf_counter() - start)
            else:
                connection.send(accuracy())
    except EOFError:  # the other end was closed: no more requests
        pass
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Contender:
    """A contender in a process of its own, which answers requests."""

    def __init__(self, name: str, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args, multiprocessing.get_start_method()))
        self.process.start()
        theirs.close()  # otherwise `recv` would not notice that the process died

    def ask(self, request: str) -> float:
        """Return the answer to "epoch" or "accuracy". Raises RuntimeError if the contender failed."""
        try:
            self.connection.send(request)
            answer = self.connection.recv()
        except (EOFError, OSError):
            answer = "its process ended"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Return, by contender, the images/s of each round and the test accuracy after the last."""
    contenders = [Contender(name, args) for name in CONTENDERS]
    contender_rows = {name: {"images_per_second_by_round": [], "test_accuracy": None} for name in CONTENDERS}
    try:
        for round_ in range(args.rounds + 1):
            first = round_ % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                speed = args.images / contender.ask("epoch")
                print(f"round {round_ or '0 (warm-up)'}  {contender.name:20s} {speed:8.1f} images/s", flush=True)
                if round_:
                    contender_rows[contender.name]["images_per_second_by_round"].append(speed)
        for contender in contenders:
            contender_rows[contender.name]["test_accuracy"] = contender.ask("accuracy")
    finally:
        for contender in contenders:
            contender.close()
    return contender_rows


def add_ratios(contender_rows: dict[str, dict]) -> dict[str, dict]:
    """Add medians, and ratios to the reference's images/s in the same round, to the rows of all contenders."""
    base = contender_rows[BASE]["images_per_second_by_round"]
    for name, row in contender_rows.items():
        speeds = row["images_per_second_by_round"]
        ratios = [a / b for a, b in zip(speeds, base, strict=True)]
        contender_rows[name] = {
            "what": CONTENDERS[name][0],
            "images_per_second": statistics.median(speeds),
            "times_reference": statistics.median(ratios),
            "times_reference_by_round": ratios,
            **row,
        }
    return contender_rows


def table(contender_rows: dict[str, dict]) -> str:
    """Return the rows of all contenders as text."""
    lines = [f"{'':20s} {'images/s':>9s} {'x reference':>12s} {'lowest':>7s} {'highest':>8s} {'test accuracy':>14s}"]
    for name, row in contender_rows.items():
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
    add("--images", type=int, default=10000, help="training images per epoch (default: %(default)s)")
    add("--rounds", type=int, default=3, help="timed epochs of each contender (default: %(default)s)")
    add("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    try:
        make_data(settings(args))  # checks the path, and decodes the images once for all contenders
        contender_rows = add_ratios(measure(args))
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(f"\n{table(contender_rows)}\n\nwritten: {args.out}")
    filed = record.header("images/s of whole CIFAR-10 epochs of the reference network, loading included")
    filed["settings"] = {"images": args.images, "rounds": args.rounds, "workers_of_the_reference": WORKERS}
    record.write_json(args.out, filed | {"contenders": contender_rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
