"""The `sid` command. It turns arguments into calls and errors into one line; it holds no logic."""

import argparse
import codecs
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError, set_flush_denormal

from .distributed.rendezvous import LostRank, is_main_process, leave, wait_for_main_process
from .options import make_parser
from .training.config import MOVABLE, RunConfig, run_config
from .training.cpu import dtype_advice
from .training.trainer import Interrupted, NonFiniteLoss, Trainer

# What the folder of a data set contains. The first match counts: Tiny-ImageNet has a folder `train`, too.
CONTENTS = {
    "wnids.txt": "tiny-imagenet", "train": "folder", "MNIST": "mnist", "FashionMNIST": "fashion-mnist",
    "cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100",
}  # fmt: skip


def find_dataset(path: str | None) -> str:
    """Return the name of the data set in a file or folder, for --data without --dataset."""
    if path is None:
        return "digits"
    unknown = "text" if Path(path).is_file() or any(Path(path).glob("[!.]*.txt")) else "folder"
    return next((name for entry, name in CONTENTS.items() if (Path(path) / entry).exists()), unknown)


def settings(args: argparse.Namespace) -> RunConfig:
    """Return the settings of a run from the arguments."""
    given: dict[str, Any] = {field.name: vars(args).get(field.name) for field in fields(RunConfig)}
    return run_config(**given | {"dataset": given["dataset"] or find_dataset(given["data"])})


def train(args: argparse.Namespace) -> None:
    """Train a network and draw what its stages learn."""
    from .runs.build import resume_run, start_run

    for package in ("pandas", "seaborn"):  # needed at the end, to draw the run
        if find_spec(package) is None:
            raise ImportError(name=package)
    set_flush_denormal(True)  # before PyTorch starts its threads, which inherit it
    if hasattr(args, "resume"):
        given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "resume")}
        if fixed := sorted(given.keys() - MOVABLE):
            raise ValueError(
                f"--{fixed[0].replace('_', '-')} cannot be given with --resume: the run keeps its settings"
            )
        trainer = resume_run(args.resume, **given)
    else:
        run = settings(args)
        folder = getattr(args, "out", Path(f"runs/{run.dataset}-{run.method}"))
        trainer = start_run(run, folder, overwrite=hasattr(args, "overwrite"))
    writes = trainer.strategy.writes_run_folder
    if writes:
        print_start(trainer)
    trainer.fit()
    if writes and trainer.folder:
        print_end(trainer.folder)


def print_start(trainer: Trainer) -> None:
    """Print where a resumed run continues, and its method, data, network and operations."""
    if (trainer.epoch, trainer.step) != (1, 0):
        print(f"resumed in epoch {trainer.epoch} after step {trainer.step}")
    run, counts = trainer.metadata, [trainer.strategy.batches[name].count for name in ("train", "test")]
    print(
        f"{run['method']} on {run['dataset']}: {counts[0]} training and {counts[1]} test {trainer.data.unit},"
        f" {run['arch']} {run['layout']}, {run['depth']} stages, {run['num_parameters']:,} parameters,"
        f" {run['dtype']} on {trainer.strategy.device}"
    )
    if trainer.strategy.device.type == "cpu" and (advice := dtype_advice(run["dtype"])):
        print(advice)
    if counts := run.get("operations"):
        print(f"operations per image: {counts['training']:.3g} to train, {counts['inference']:.3g} to run all stages")


def print_end(folder: Path) -> None:
    """Print the last epoch of the run in a folder, stage by stage, and draw the run's picture."""
    from .files import PICTURE, write_atomically
    from .report.figures import draw_run
    from .report.results import load_runs

    results = load_runs([folder])
    last = results.stages[results.stages["last"]]
    when = f"after epoch {last['epoch'].max():.0f}"
    print_stages(last["stage_accuracy"], last["stage_kl"], last["certificate"], when)
    print_perplexity(last["stage_kl"], results.runs["config"].iloc[0].get("bytes_per_token"))
    picture = draw_run(results)
    write_atomically(folder / PICTURE, lambda file: file.write(picture))
    print(f"\npicture: {folder / PICTURE}")


def print_stages(accuracy: Iterable[float], kl: Iterable[float], certificate: Iterable[float], when: str) -> None:
    """Print a table with a row per stage."""
    print(f"\nstage   accuracy   KL(y|p)   certificate   {when}")
    for stage, row in enumerate(zip(accuracy, kl, certificate, strict=True), 1):
        print("{:5d} {:10.2%} {:9.4f} {:13.1%}".format(stage, *row))


def print_perplexity(kl: Iterable[float], bytes_per_token: float | None) -> None:
    """Print the perplexity and the bits per byte of each stage of a language model, from its nats per token."""
    if bytes_per_token:
        print("\nstage   nats/token   perplexity   bits/byte")
        for stage, nats in enumerate(kl, 1):
            perplexity = math.exp(nats) if nats < 700 else math.inf
            print(f"{stage:5d} {nats:12.4f} {perplexity:12.2f} {nats / math.log(2) / bytes_per_token:11.4f}")


def sample(args: argparse.Namespace) -> None:
    """Continue a text with a trained language model."""
    from .runs.sample import sample

    stages = []
    tokens = sample(
        args.run_folder, args.prompt, count=args.tokens, temperature=args.temperature, confidence=args.exit,
        seed=args.seed,
    )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may have several tokens
    for piece, number in tokens:
        print(decoder.decode(piece), end="", flush=True)
        stages += [number] * (number > 0)
    print(decoder.decode(b"", final=True))
    if args.exit is not None and stages:
        print(f"\nstages per token: {sum(stages) / len(stages):.2f} on average")


def compare(args: argparse.Namespace) -> None:
    """Train methods and seeds under one budget, and write a table and a report."""
    from .runs.compare import compare_methods

    set_flush_denormal(True)  # before PyTorch starts its threads, which inherit it
    text = compare_methods(
        settings(args), args.out, methods=args.methods, layouts=args.layouts, seeds=args.seeds,
        label_noises=args.label_noises, command=shlex.join(["sid", *sys.argv[1:]]),
    )  # fmt: skip
    print(f"\n{text}\nreport: {args.out / 'report.html'}")


def report(args: argparse.Namespace) -> None:
    """Draw runs side by side in report.png and on one HTML page."""
    from .report.page import write_report

    folders = []
    for folder in args.folders:
        inside = [] if (folder / "config.json").exists() else sorted(f.parent for f in folder.glob("*/config.json"))
        folders += inside or [folder]
    print(f"report: {write_report(folders, args.out)}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure every stage of a trained network on its test images."""
    from .runs.build import evaluate_run

    moved = {name: getattr(args, name, None) for name in ("data", "cache")}
    metrics = evaluate_run(args.run_folder, exits=args.exit, **moved)
    unit = "tokens" if "tokens" in metrics else "images"
    print_stages(metrics["accuracy"], metrics["kl"], metrics["certificate"], f"on {metrics[unit]} test {unit}")
    print_perplexity(metrics["kl"], metrics.get("bytes_per_token"))
    for name, meaning in (("plain", "trunk and last head alone"), ("averaged", "mean of the stages' log-beliefs")):
        if name in metrics:
            print(f"{name} {metrics[name]:.2%}   ({meaning})")
    if args.exit:
        print_exits(metrics, args.run_folder)


def print_exits(metrics: dict, path: Path) -> None:
    """Print a row per confidence, and draw them in a picture in the run's folder."""
    from .files import EXITS, write_atomically
    from .report.figures import draw_exits

    print("\nconfidence   accuracy   operations   images that leave at each stage")
    for row in metrics["exits"]:
        shares = " ".join(f"{share:4.0%}" for share in row["stages"])
        print(f"{row['confidence']:>10} {row['accuracy']:10.2%} {row['operations']:12,.0f}   {shares}")
    if "plain" in metrics:
        print(f"{'plain':>10} {metrics['plain']:10.2%} {metrics['plain_operations']:12,.0f}")
    picture, file = draw_exits(metrics), (path if path.is_dir() else path.parent) / EXITS
    write_atomically(file, lambda stream: stream.write(picture))
    print(f"\npicture: {file}")


def export(args: argparse.Namespace) -> None:
    """Write a trained network as a program that does not need this package."""
    from .runs.export import export_run

    print(f"written: {export_run(args.run_folder, args.out, args.format, plain=args.plain)}")


def fail(command: str, message: str, status: int) -> int:
    """Print the first line of a message and return the exit status."""
    print(f"{command}: {message.splitlines()[0]}", file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run `sid`. Return 0, or 1 if training failed, 2 for a request that cannot be met, 130 if interrupted."""
    command = "sid"
    try:
        run = {
            "train": train, "compare": compare, "report": report, "eval": evaluate, "export": export, "sample": sample,
        }  # fmt: skip
        args = make_parser(run).parse_args(arguments)
        command = f"sid {args.command}"
        args.run(args)
        return 0
    except SystemExit as end:  # the message is printed, here or by another process
        return int(end.code or 0)
    except ImportError as error:
        extra = "onnx" if str(error.name).startswith("onnx") else "trainer"
        return fail(command, f'error: {error.name!r} cannot be imported; install it: pip install -e ".[{extra}]"', 2)
    except (ValueError, OSError) as error:
        if is_main_process():
            return fail(command, f"error: {error}", 2)
        wait_for_main_process()
        return 2
    except (NonFiniteLoss, LostRank, OutOfMemoryError) as error:
        return fail(command, str(error), 1)
    except (Interrupted, KeyboardInterrupt) as error:
        return fail(command, str(error) or "interrupted", 130)
    finally:
        leave()
