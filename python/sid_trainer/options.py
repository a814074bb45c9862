"""The arguments of the `sid` command. The flags of a run are made from the fields of `RunConfig`.

Plain argparse does this in 30 lines and reports an error in one line, so `sid` needs no package for its flags.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from .training.config import GROUPS, METHODS, RunConfig

METAVARS = {int: "N", float: "X", str: None}  # None: the name of the setting
# Settings of which `compare` takes several values, and the default values.
COMPARED: dict[str, list] = {"method": list(METHODS), "layout": ["stagewise"], "seed": [0, 1], "label_noise": [0.0]}


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def path(text: str) -> Path:
    """Convert an argument to a path. Reject the empty text, which pathlib takes for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def make_parser(run: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    `run` maps each command to the function that runs it, whose docstring is the summary in the help. Settings that are
    not given have no attribute in the parsed arguments.
    """
    top = Parser(prog="sid", description="Train networks by synergistic information distillation (SID).")
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(run))
    parsers = {}
    for name, function in run.items():
        summary = function.__doc__
        parser = commands.add_parser(name, help=summary, description=summary, argument_default=argparse.SUPPRESS)
        parser.set_defaults(run=function)
        parsers[name] = parser
    run_folder: dict[str, Any] = {"metavar": "RUN", "type": path, "help": "folder of a run, or one of its checkpoints"}

    add = parsers["train"].add_argument
    add("--resume", **run_folder | {"help": "continue a run: its folder, or one of its checkpoints"})
    add("--out", metavar="DIR", type=path, help="folder of the run (default: runs/DATASET-METHOD)")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add_settings(parsers["train"])

    add = parsers["compare"].add_argument
    add("--out", metavar="DIR", type=path, required=True, help="folder of the runs; a comparison there is continued")
    add_settings(parsers["compare"], COMPARED)

    add = parsers["report"].add_argument
    add("folders", metavar="RUN", type=path, nargs="+", help="folders of runs, or folders of several runs")
    add("--out", metavar="DIR", type=path, default=Path("report"), help="folder to write to (default: report)")

    add = parsers["eval"].add_argument
    add("run_folder", **run_folder)
    add("--data", metavar="PATH", help="folder of its data set, if it was moved")
    add("--cache", metavar="DIR", help="folder for decoded images and tokens")
    add("--exit", action="store_true", default=False, help="measure accuracy and operations if sure images leave early")

    add = parsers["sample"].add_argument
    add("run_folder", **run_folder)
    add("--prompt", metavar="TEXT", default="\n", help="text to continue (default: a new line)")
    add("--tokens", metavar="N", type=int, default=400, help="number of tokens to add (default: 400)")
    add("--temperature", metavar="X", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    add("--exit", metavar="X", type=float, default=None, help="stop at the first stage whose belief has an entry of X")
    add("--seed", metavar="N", type=int, default=0, help="seed of the draws (default: 0)")

    add = parsers["export"].add_argument
    add("run_folder", **run_folder)
    add("--format", choices=("torch", "onnx"), default="torch", help="torch is for torch.export.load (default: torch)")
    add("--plain", action="store_true", default=False, help="write the trunk and the last head alone")
    add("--out", metavar="FILE", type=path, default=None, help="file (default: network.pt2 or .onnx in its folder)")
    return top


def add_settings(parser: argparse.ArgumentParser, compared: Mapping[str, list] | None = None) -> None:
    """Add a flag for each field of `RunConfig`. Those in `compared` take several values, by default the ones there."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for setting in fields(RunConfig):
        flag, arguments = f"--{setting.name.replace('_', '-')}", flag_arguments(setting)
        if compared and setting.name in compared:
            default = compared[setting.name]
            help = f"{setting.metadata['help']} (default: {' '.join(map(str, default))})"
            arguments |= {"nargs": "+", "default": default, "dest": f"{setting.name}s", "help": help}
            flag += "" if setting.name == "label_noise" else "s"
        groups[setting.metadata["group"]].add_argument(flag, **arguments)


def flag_arguments(setting: Field[Any]) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a setting: its help text, and what follows from its type."""
    kinds = [setting.type, *get_args(setting.type)]  # of Sequence[int] | None also int
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    kind = next(kind for kind in (bool, str, int, float) if kind in kinds)
    help, default = setting.metadata["help"], setting.default
    if default is not None and "(default" not in help:
        help += f" (default: {('yes' if default else 'no') if kind is bool else default})"
    typed = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": METAVARS[kind]}
    return {"help": help, **typed, **setting.metadata["flag"]}
