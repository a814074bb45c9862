"""The `sid` command. It turns arguments into calls and errors into one line; it holds no logic."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import OutOfMemoryError, set_flush_denormal

from .distributed.rendezvous import LostRank, is_main_process, leave, wait_for_main_process
from .options import parser
from .training.config import MOVABLE, RunConfig
from .training.trainer import Interrupted, NonFiniteLoss, Trainer

HOLDS = {  # what lies in a data set's folder, the first that is there: Tiny-ImageNet has a train, too
    "wnids.txt": "tiny-imagenet", "train": "folder", "MNIST": "mnist", "FashionMNIST": "fashion-mnist",
    "cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100",
}  # fmt: skip


def dataset_of(path: str | None) -> str:
    """Return the name of the data set that lies at --data, for a command without --dataset."""
    if path is None:
        return "digits"
    return next((name for entry, name in HOLDS.items() if (Path(path) / entry).exists()), "folder")


def settings(args: argparse.Namespace) -> dict:
    """Return the arguments that are settings of a run."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    given = {name: value for name, value in vars(args).items() if name in known}
    return {"dataset": dataset_of(given.get("data"))} | given


def run_train(args: argparse.Namespace) -> None:
    from .runs.build import resume_run, start_run
    from .training.config import run_config

    set_flush_denormal(True)  # before PyTorch starts its threads, which take it over
    if hasattr(args, "resume"):
        given = vars(args).keys() - {"command", "run", "resume"}
        if fixed := sorted(given - set(MOVABLE)):
            raise ValueError(f"--{fixed[0].replace('_', '-')} cannot be given with --resume: the run has its settings")
        trainer = resume_run(args.resume, **{name: getattr(args, name) for name in given})
        if trainer.strategy.writes_run_folder:
            print(f"resumed in epoch {trainer.epoch} after step {trainer.step}")
    else:
        run = run_config(**{name: value for name, value in settings(args).items()})
        folder = getattr(args, "out", Path(f"runs/{run.dataset}-{run.method}"))
        trainer = start_run(run, folder, overwrite=hasattr(args, "overwrite"))
    if trainer.strategy.writes_run_folder:
        introduce(trainer)
    trainer.fit()
    if trainer.strategy.writes_run_folder and trainer.folder:
        show(trainer.folder)


def introduce(trainer: Trainer) -> None:
    about, data = trainer.metadata, trainer.data
    print(
        f"{about['method']} on {about['dataset']}: {len(data.train.labels)} training and {len(data.test.labels)} test"
        f" images, {about['arch']} {about['layout']}, {about['depth']} stages, {about['num_parameters']:,} parameters,"
        f" {about['dtype']} on {trainer.strategy.device}"
    )


def show(folder: Path) -> None:
    """Print the last epoch of the run in a folder by stage, and draw the run's picture."""
    from .files import PICTURE, write_atomically
    from .report.figures import draw_run
    from .report.results import load_runs

    results = load_runs([folder])
    last = results.stages[results.stages["last"]]
    table(last["stage_accuracy"], last["stage_kl"], last["certificate"], f"after epoch {last['epoch'].max():.0f}")
    picture = draw_run(results)
    write_atomically(folder / PICTURE, lambda file: file.write(picture))
    print(f"\npicture: {folder / PICTURE}")


def table(accuracy: Iterable[float], kl: Iterable[float], certificate: Iterable[float], when: str) -> None:
    print(f"\nstage   accuracy   KL(y|p)   certificate   {when}")
    for stage, (a, b, c) in enumerate(zip(accuracy, kl, certificate, strict=True), 1):
        print(f"{stage:5d} {a:10.2%} {b:9.4f} {c:13.1%}")


def run_compare(args: argparse.Namespace) -> None:
    from .runs.compare import compare
    from .training.config import run_config

    set_flush_denormal(True)  # before PyTorch starts its threads, which take it over
    given = settings(args)
    given.pop("label_noise")
    text = compare(
        run_config(**given), args.out, methods=args.methods, layouts=args.layouts, seeds=args.seeds,
        noises=args.label_noise, command=shlex.join(["sid", *sys.argv[1:]]),
    )  # fmt: skip
    print(f"\n{text}\nreport: {args.out / 'report.html'}")


def run_report(args: argparse.Namespace) -> None:
    from .report.page import write_report

    folders = []
    for folder in args.folders:
        inside = [] if (folder / "config.json").exists() else sorted(f.parent for f in folder.glob("*/config.json"))
        folders += inside or [folder]
    print(f"report: {write_report(folders, args.out)}")


def run_eval(args: argparse.Namespace) -> None:
    from .runs.build import evaluate_run

    found = evaluate_run(args.run_folder, data=getattr(args, "data", None), cache=getattr(args, "cache", None))
    table(found["accuracy"], found["kl"], found["certificate"], f"on {found['images']} test images")


def run_export(args: argparse.Namespace) -> None:
    from .runs.export import export_run

    print(f"written: {export_run(args.run_folder, args.out, args.format)}")


COMMANDS = {
    "train": run_train, "compare": run_compare, "report": run_report, "eval": run_eval, "export": run_export,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 if training failed, 2 if the request is not possible, 130 if interrupted."""
    try:
        args = parser(COMMANDS).parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    prog = f"sid {args.command}"
    try:
        args.run(args)
    except ImportError as error:
        print(f"{prog}: error: this needs the package {error.name!r}, which is not installed", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if is_main_process():
            print(f"{prog}: error: {error}", file=sys.stderr)
        else:
            wait_for_main_process()
        return 2
    except (NonFiniteLoss, LostRank) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except OutOfMemoryError as error:
        print(f"{prog}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0
