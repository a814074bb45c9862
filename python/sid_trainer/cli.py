"""The `sid` command: `sid train` and `sid plot`. It turns arguments into calls and errors into one line."""

import argparse
import sys
from pathlib import Path

import torch

from .architectures import NETWORKS, build_network
from .data import DATASETS, load_data
from .memory import keep_freed_memory
from .report import draw_run, ideal_kl, read_run
from .step import STEPS
from .trainer import DTYPES, Interrupted, NonFiniteLoss, TrainConfig, Trainer

DEFAULTS = TrainConfig()
PICTURE = "stages.png"


class Parser(argparse.ArgumentParser):
    """A wrong argument gets one line, not argparse's usage text before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one number or word to name."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="sid", description="Train networks by synergistic information distillation (SID).")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | plot")
    summary = "train a network and draw what its stages learn"
    train = commands.add_parser("train", help=summary, description=summary, formatter_class=Formatter)
    names = sorted({arch for arch, _ in NETWORKS}), sorted({layout for _, layout in NETWORKS})
    train.add_argument(
        "--dataset", choices=DATASETS, help="(default: what --data holds; without it digits, which needs no files)"
    )
    train.add_argument(
        "--data", metavar="PATH", help="an image folder (train/<class>/..., test/<class>/...) or MNIST's files"
    )
    train.add_argument("--download", action="store_true", help="fetch mnist into --data")
    train.add_argument("--cache", metavar="DIR", help="folder for decoded images (default: the user's cache folder)")
    train.add_argument("--arch", choices=names[0], default="simple_cnn")
    train.add_argument("--layout", choices=names[1], default="shared")
    train.add_argument("--depth", type=int, default=10, help="belief stages")
    train.add_argument("--method", choices=STEPS, default=DEFAULTS.method, help="how gradients are made")
    train.add_argument("--epochs", type=int, help="(default: 30 for digits, else 5)")
    train.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size)
    train.add_argument("--lr", type=float, default=DEFAULTS.lr, help="Adam's learning rate")
    train.add_argument("--alpha", type=float, default=DEFAULTS.alpha, help="weight of fidelity against consistency")
    train.add_argument("--crop", type=int, metavar="PIXELS", help="pad and crop by this (default: folder 4, else 0)")
    train.add_argument("--flip", action=argparse.BooleanOptionalAction, help="random mirroring (default: for folder)")
    train.add_argument("--seed", type=int, default=DEFAULTS.seed)
    train.add_argument("--dtype", choices=DTYPES, default=DEFAULTS.dtype, help="bfloat16 is by autocast")
    train.add_argument("--device", default=DEFAULTS.device)
    train.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=DEFAULTS.channels_last)
    train.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/DATASET-METHOD)")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    train.set_defaults(run=run_train)

    plot = commands.add_parser("plot", help="draw a run's picture again")
    plot.add_argument("folder", metavar="RUN", type=Path, help="a run's folder")
    plot.set_defaults(run=run_plot)
    return top


def dataset_of(path: str | None) -> str:
    """What lies at --data, where --dataset does not say."""
    if path is None:
        return "digits"
    return "mnist" if (Path(path) / "MNIST").is_dir() and not (Path(path) / "train").is_dir() else "folder"


def run_train(args: argparse.Namespace) -> None:
    args.dataset = args.dataset or dataset_of(args.data)
    folder = Path(args.out or f"runs/{args.dataset}-{args.method}")
    if (folder / "config.json").exists() and not args.overwrite:
        raise ValueError(f"{folder}: holds a run already; choose another --out or give --overwrite")
    if args.data is not None and args.dataset == "digits":
        raise ValueError("--data means nothing for digits; --dataset folder or mnist reads files")
    epochs = (30 if args.dataset == "digits" else DEFAULTS.epochs) if args.epochs is None else args.epochs
    config = TrainConfig(
        args.method, epochs, args.batch_size, args.lr, args.alpha, args.seed, args.dtype, args.device,
        args.channels_last,
    )  # fmt: skip
    if args.flip and args.dataset in ("digits", "mnist"):
        raise ValueError(f"--flip makes no sense for {args.dataset}: a mirrored digit is not that digit")
    if args.crop is not None and args.crop < 0:
        raise ValueError(f"--crop must be 0 or more, not {args.crop}")
    data = load_data(args.dataset, args.data, cache=args.cache, download=args.download)
    data = data._replace(
        crop=data.crop if args.crop is None else args.crop, flip=data.flip if args.flip is None else args.flip
    )
    torch.manual_seed(args.seed)
    network = build_network(
        args.arch, args.layout, num_classes=len(data.classes), in_channels=data.in_channels, depth=args.depth
    )
    about = {key: value for key, value in vars(args).items() if key not in ("run", "command", "overwrite")}
    about |= {"epochs": epochs, "crop": data.crop, "flip": data.flip, "classes": data.classes}
    keep_freed_memory()
    trainer = Trainer(network, data, config, folder, about=about)
    for stale in ("last.pt", PICTURE):
        (folder / stale).unlink(missing_ok=True)
    print(
        f"{args.method} on {args.dataset}: {len(data.train.labels)} training and {len(data.test.labels)} test images,"
        f" {args.arch} {args.layout}, {args.depth} stages, {config.dtype} on {trainer.device}"
    )
    trainer.fit()
    finish(folder)


def run_plot(args: argparse.Namespace) -> None:
    finish(args.folder)


def finish(folder: Path) -> None:
    """From what the run left in its folder: the table of the last epoch by stage, and the picture."""
    rows, config = read_run(folder)
    last = rows[-1]
    print(f"\nstage   accuracy   KL(y|p)    after epoch {last['epoch']}")
    for stage, (accuracy, kl) in enumerate(zip(last["stage_accuracy"], last["stage_kl"], strict=True), 1):
        print(f"{stage:5d} {accuracy:10.2%} {kl:9.4f}")
    picture = folder / PICTURE
    sid = config["method"] != "bp"
    ideal = ideal_kl(config["alpha"], len(config["classes"]), len(last["stage_kl"])) if sid else None
    draw_run(rows, picture, title=folder.name, ideal=ideal)
    print(f"\npicture: {picture}")


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 when training failed, 2 when what was asked for is not possible, 130 when interrupted."""
    try:
        args = parser().parse_args(arguments)
    except SystemExit as end:
        return end.code
    prog = f"sid {args.command}"
    try:
        args.run(args)
    except ImportError as error:
        print(f"{prog}: error: this needs the package {error.name!r}, which is not installed", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0
