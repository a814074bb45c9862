"""The arguments of the `sid` command, in words. What they may be is the settings' own business."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from .data.datasets import DATASETS
from .methods.common import STEP_SCHEDULES
from .methods.factory import LR_SCHEDULES, METHODS, OPTIMIZERS
from .network.architectures import LAYOUTS, TRUNKS
from .training.config import DTYPES, PARALLEL, RunConfig


class Parser(argparse.ArgumentParser):
    """A wrong argument gets one line, not argparse's usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(run: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` maps each command to the function that runs it."""
    top = Parser(prog="sid", description="Train networks by synergistic information distillation (SID).")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | compare | report | eval | export")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary + ".", argument_default=argparse.SUPPRESS)
        added.set_defaults(run=run[name])
        return added

    train = command("train", "train a network and draw what its stages learn")
    train.add_argument(
        "--resume", metavar="RUN", type=Path, help="go on with a run: its folder, or one of its checkpoints"
    )
    train.add_argument("--method", choices=METHODS, help=f"how gradients are made {default('method')}")
    train.add_argument("--layout", choices=LAYOUTS, help="one trunk for all stages, or the trunk cut into stages "
                       + default("layout"))  # fmt: skip
    train.add_argument("--label-noise", type=float, metavar="SHARE", help="training labels to make wrong, 0 to 1")
    train.add_argument("--seed", type=int, help=f"of the network, order, crops, flips and noise {default('seed')}")
    train.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (default: runs/DATASET-METHOD)")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_run_options(train)

    compare = command("compare", "train methods and seeds under one budget, and write table and report")
    compare.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    compare.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["stagewise"], help="(default: stagewise)")
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="(default: 0 1)")
    compare.add_argument("--label-noise", nargs="+", type=float, default=[0.0], metavar="SHARE", help="(default: 0)")
    compare.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder of the runs; a comparison there goes on"
    )
    add_run_options(compare)

    report = command("report", "draw runs side by side: report.png and one HTML page")
    report.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="folders of runs, or of many runs")
    report.add_argument("--out", metavar="DIR", type=Path, default=Path("report"), help="(default: report)")

    evaluate = command("eval", "what every stage of a trained network knows of a data set")
    evaluate.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    evaluate.add_argument("--data", metavar="PATH", help="where its data set lies now")
    evaluate.add_argument("--cache", metavar="DIR", help="folder for decoded images")

    export = command("export", "write a trained network as a program that needs nothing of this package")
    export.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    export.add_argument(
        "--format", choices=("torch", "onnx"), default="torch", help="(default: torch, for torch.export.load)"
    )
    export.add_argument("--out", metavar="FILE", type=Path, default=None, help="(default: RUN/network.pt2 or .onnx)")
    return top


def default(name: str) -> str:
    return f"(default: {getattr(RunConfig, name)})"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `train` and `compare` share; those that the architecture's recipe sets have no default."""
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", choices=DATASETS, help="(default: what --data holds; without it digits, which needs no files)")
    add(
        "--data",
        metavar="PATH",
        help="the data set's files: an image folder (train/<class>/..., test/<class>/...), or a root",
    )
    add("--download", action="store_true", help="fetch the data set into --data")
    add("--cache", metavar="DIR", help="folder for decoded images (default: the user's cache folder)")
    add("--image-size", type=int, metavar="PIXELS", help="resize and cut images to this while decoding")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="decode images as they are asked for (default: large sets)",
    )
    add("--workers", type=int, help=f"processes that decode streamed images {default('workers')}")
    add("--train-images", type=int, metavar="N", help="train on a fixed class-balanced subset of this many")
    add("--val", type=float, metavar="SHARE", help="training images to hold out for validation, 0 to 1 (default: 0)")
    add("--crop", type=int, metavar="PIXELS", help="pad and crop by this (default: what suits the data set)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random mirroring (default: what suits the data set)")

    add_network_options(parser)

    loss = parser.add_argument_group("local loss")
    add = loss.add_argument
    add(
        "--alpha",
        help=f"fidelity against consistency: a number, FIRST:LAST over depth, or one a stage {default('alpha')}",
    )
    add("--divergence", choices=("forward", "reverse"), help=default("divergence"))
    add("--label-smoothing", type=float, help=default("label_smoothing"))
    add("--schedule", choices=STEP_SCHEDULES, help=f"of SID's step {default('schedule')}")
    add(
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="equal stages in one kernel; else one stage's activations at a time (default: yes)",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=int, help="(default: 30 for digits, else 5)")
    add("--batch-size", type=int, help=default("batch_size"))
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        help="(default: the network's recipe, as --lr, --weight-decay and --lr-schedule)",
    )
    add("--lr", type=float, help="the highest learning rate")
    add("--weight-decay", type=float)
    add("--lr-schedule", choices=LR_SCHEDULES)

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--dtype", choices=DTYPES, help=f"bfloat16 is by autocast {default('dtype')}")
    add("--device", help=default("device"))
    add("--channels-last", action=argparse.BooleanOptionalAction, help="(default: yes)")
    add("--streams", action=argparse.BooleanOptionalAction, help="on a GPU, a CUDA stream a stage (default: yes)")
    add("--graph", action=argparse.BooleanOptionalAction, help="on a GPU, the step as one CUDA graph (default: no)")
    add("--save-every", type=int, metavar="STEPS", help="also save within epochs")

    processes = parser.add_argument_group("many processes, started by torchrun")
    add = processes.add_argument
    add(
        "--parallel",
        choices=PARALLEL,
        help="share every batch, also the parameters, or the stages as a pipeline " + default("parallel"),
    )
    add("--replicas", type=int, help="pipelines side by side, sharing every batch " + default("replicas"))
    add("--stages-per-rank", type=int, nargs="+", metavar="N", help="(default: balanced by what the stages cost)")
    add("--in-flight", type=int, help="batches on their way between two ranks " + default("in_flight"))
    add("--timeout", type=float, metavar="SECONDS", help="of silence that end a run " + default("timeout"))


def add_network_options(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--arch", choices=TRUNKS, help=default("arch"))
    add("--depth", type=int, help="stages (default: 10 shared, the network's own cuts stagewise)")
    add("--head-depth", type=int, help=f"hidden layers of each belief head {default('head_depth')}")
    add("--hidden-dim", type=int, help=f"their width {default('hidden_dim')}")
    add("--grid", type=int, help=f"stagewise heads read features pooled to GRID x GRID {default('grid')}")
