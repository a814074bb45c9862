"""Train SID, its variants and other methods over seeds, and tabulate their accuracy: the tables of docs/results.md.

    python bench/training/accuracy.py --data DATA --tables cifar10-10k --seeds 0 1 --out bench/results/accuracy.json

A table is a set of cells. A cell is the settings of one `sid train` run, and every cell is trained with every seed.
The result of a run is its state after the last epoch; nothing is chosen by test images. The runs of all tables are
spread over `--jobs` processes, and the JSON file is written after each run. A run that is in the file already is not
repeated, so a table can be continued with more seeds.

Cells named "teacher: ..." replace the prior in the loss of a stage, those named "trial: ..." change the heads. These
experiments are not part of the library.
"""

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch
from torch import Tensor, nn

from bench.lib import record
from sid_kernels import local_loss_and_grad
from sid_trainer import SIDNetwork, Trainer
from sid_trainer.data.batches import Batches
from sid_trainer.data.datasets import Split
from sid_trainer.data.splits import add_label_noise
from sid_trainer.methods import step as step_module
from sid_trainer.methods.common import teacher_beliefs as beliefs_of
from sid_trainer.network.heads import FeaturePooling
from sid_trainer.options import Parser
from sid_trainer.runs.build import make_config, make_data, make_network
from sid_trainer.training.config import run_config
from sid_trainer.training.evaluation import accuracy, exit_curve
from sid_trainer.training.operations import exit_operations, training_operations

# ---------------------------------------------------------------- cells

NORM: dict[str, Any] = {"layout": "stagewise", "norm": True, "lr_schedule": "one-cycle"}
BP = NORM | {"method": "bp", "classifier": "mlp"}
HEADS = NORM | {"tail": 1, "prior_input": False}  # the prior in the loss only
SID = HEADS | {"method": "sid", "alpha": "0.5,0.7,0.8,0.9"}
GREEDY = HEADS | {"method": "greedy"}

CONTROLS = {
    "bp, linear classifier": NORM | {"method": "bp"},
    "bp": BP,
    "bp, smoothed labels": BP | {"label_smoothing": 0.1},
    "bp, longer": BP | {"epochs": 1.75},  # 1.75 times the table's epochs, for about as many operations as SID
    "deep supervision, same heads": HEADS | {"method": "deep-supervision"},
}
METHODS = {
    "sid": SID,
    "sid, prior as input, dropped for 30%": SID | {"prior_input": True, "prior_dropout": 0.3},
    "sid, prior as input": SID | {"prior_input": True},
    "sid, graded labels": SID | {"label_smoothing": "graded"},
    "greedy": GREEDY,
    "greedy, graded labels": GREEDY | {"label_smoothing": "graded"},
    "greedy, no tails": GREEDY | {"tail": 0},
    "sid, no tails": SID | {"tail": 0},
}
SMALL_ONLY = ("sid, prior as input", "greedy, no tails", "sid, no tails", "bp, linear classifier")  # 10k images only
TEACHERS = {
    "teacher: corrected": SID,
    "teacher: confident": SID,
    "teacher: hotter": SID,
    "teacher: colder": SID,
    "teacher: average over time": SID | {"schedule": "two-phase"},
    "teacher: last stage": SID | {"schedule": "two-phase"},
}
RESIDUAL = {"trial: residual beliefs": SID}
TRIALS = RESIDUAL | {"trial: tails at half the resolution": SID}
ONE_ALPHA = {"sid, alpha 0.5 in every stage": SID | {"alpha": 0.5}}
BELIEF = {name: (CONTROLS | METHODS)[name] for name in ("bp", "sid", "sid, graded labels", "greedy")}
BELIEF |= {"greedy, graded labels": METHODS["greedy, graded labels"]} | TEACHERS
MAIN = {name: (CONTROLS | METHODS)[name] for name in ("bp", "bp, smoothed labels", "sid", "greedy, graded labels")}
EXIT = {name: (CONTROLS | METHODS)[name] for name in ("bp", "sid", "sid, no tails")} | TRIALS | ONE_ALPHA

SHARED = {"sid": {"layout": "shared", "method": "sid", "alpha": "0.5:0.9"}}
SHARED |= {"sid, alpha 0.5 in every stage": SHARED["sid"] | {"alpha": 0.5}}


def by_depth(cells: dict[str, dict], depth: int, **more: Any) -> dict[str, dict]:
    """Return the cells with alpha from 0.5 to 0.9 for another number of stages."""
    shared = {"depth": depth} | more
    return {name: cell | shared | ({"alpha": "0.5:0.9"} if "alpha" in cell else {}) for name, cell in cells.items()}


# By name of the table: the settings that all of its cells share, and the settings of each cell. `change` names a
# function of `CHANGED_DATA`.
CIFAR = {"dataset": "cifar10", "epochs": 12}
SMALL = CIFAR | {"train_images": 10_000}
MLP = {"dataset": "mnist", "arch": "mlp", "crop": 0}
TABLES: dict[str, tuple[dict[str, Any], dict[str, dict]]] = {
    "cifar10": (CIFAR, {name: cell for name, cell in (CONTROLS | METHODS).items() if name not in SMALL_ONLY}),
    "cifar10-10k": (SMALL, CONTROLS | METHODS | TEACHERS),
    "noise-40": (SMALL | {"label_noise": 0.4, "epochs": 24}, BELIEF),
    "noise-20-long": (SMALL | {"label_noise": 0.2, "epochs": 100, "crop": 0, "flip": False}, MAIN),
    "noise-40-long": (SMALL | {"label_noise": 0.4, "epochs": 100, "crop": 0, "flip": False}, MAIN),
    "few-labels": (CIFAR | {"train_images": 1_000, "epochs": 60}, BELIEF),
    "many-classes": (SMALL | {"flip": False, "change": "rotations"}, BELIEF),
    "resnet18": (SMALL | {"arch": "resnet18"}, by_depth(MAIN | {"deep supervision": GREEDY | {
        "method": "deep-supervision", "tail": 0}}, 4)),
    "resnet18-8": (SMALL | {"arch": "resnet18"}, by_depth(MAIN, 8)),
    "vgg11": (SMALL | {"arch": "vgg11"}, by_depth(MAIN, 5)),
    "vit_tiny": (SMALL | {"arch": "vit_tiny"}, by_depth(MAIN, 4)),
    "mnist": ({"dataset": "mnist", "epochs": 5}, MAIN),
    "cifar10-16x16": (CIFAR | {"train_images": 5_000, "change": "halves"}, EXIT),
    "cifar10-16x16-shared": (CIFAR | {"train_images": 5_000, "change": "halves"}, SHARED),
    "mnist-mlp-10k": (MLP | {"train_images": 10_000, "epochs": 4}, MAIN | ONE_ALPHA),
    "mnist-mlp-pairs-5k": (
        MLP | {"train_images": 5_000, "epochs": 12, "change": "pairs"}, BELIEF | ONE_ALPHA | RESIDUAL
    ),
    "mnist-mlp-noise-20": (MLP | {"train_images": 2_000, "label_noise": 0.2, "epochs": 30}, BELIEF | ONE_ALPHA),
    "mnist-mlp-few-labels": (MLP | {"train_images": 1_000, "epochs": 40}, BELIEF | ONE_ALPHA),
}  # fmt: skip


# ---------------------------------------------------------------- teachers on trial


def corrected(prior: Tensor, targets: Tensor) -> Tensor:
    """Return the prior (B, C) with the probability of the label and the largest one exchanged."""
    truth = targets[:, None]
    largest, where = prior.max(dim=1, keepdim=True)
    return prior.scatter(1, where, prior.gather(1, truth)).scatter(1, truth, largest)


def confident(prior: Tensor, targets: Tensor) -> Tensor:
    """Return the prior (B, C) mixed with the label; the weight of the prior is its largest entry."""
    share = prior.amax(dim=1, keepdim=True)
    return (share * prior).scatter_add(1, targets[:, None], 1 - share)


def tempered(prior: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the prior (B, C) at another temperature; above 1 it is more uniform."""
    return (prior.clamp_min(1e-30).log() / temperature).softmax(dim=1)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "teacher: corrected": corrected,
    "teacher: confident": confident,
    "teacher: hotter": lambda prior, targets: tempered(prior, targets, 2.0),
    "teacher: colder": lambda prior, targets: tempered(prior, targets, 0.5),
}


def use_teacher(name: str, network: SIDNetwork) -> None:
    """Replace the teacher that `sid_step` gives a stage by the one of a cell; other cells get the ordinary teacher."""
    change = CHANGES.get(name)

    def changed(logits: Tensor, prior: Tensor, targets: Tensor, *rest: Any, **options: Any) -> Any:
        return local_loss_and_grad(logits, change(prior, targets), targets, *rest, **options)

    step_module.local_loss_and_grad = changed if change else local_loss_and_grad
    step_module.teacher_beliefs = beliefs_of
    if name == "teacher: average over time":
        average = copy.deepcopy(network).eval()
        pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
        pairs = [(a, b) for a, b in pairs if a.is_floating_point()]

        def averaged(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
            with torch.no_grad():
                torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 0.01)
            return beliefs_of(average, inputs, dtype)

        step_module.teacher_beliefs = averaged
    elif name == "teacher: last stage":
        step_module.teacher_beliefs = lambda *arguments: [beliefs_of(*arguments)[-1]] * network.depth


# ---------------------------------------------------------------- heads on trial


class ResidualHead(nn.Module):
    """A head whose logits are added to the logarithm of the prior."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """Return the logits (B, C) for features (B, ...) and the prior belief (B, C)."""
        return self.head(features, prior) + prior.clamp_min(1e-30).log()


def change_heads(name: str, network: SIDNetwork) -> None:
    """Change the heads of the network as the cell called `name` says; other cells keep theirs."""
    for stage in network.stages:
        if name == "trial: residual beliefs":
            stage.head = ResidualHead(stage.head)
        elif name == "trial: tails at half the resolution" and not isinstance(stage.head.pooling, FeaturePooling):
            stage.head.pooling.insert(0, nn.AvgPool2d(2))  # before the tail, which is before the FeaturePooling


# ---------------------------------------------------------------- a run

# Of the curve of early exit: an image leaves at the first stage that is so sure. Above 1, none leaves early.
CONFIDENCES = (0.5, 0.52, 0.54, 0.56, 0.58, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95, 0.99, 2.0)


def rotated(split: Split, seed: int) -> Split:
    """Rotate each image by a random multiple of 90 degrees; each pair of class and rotation becomes a class."""
    turns = torch.randint(0, 4, (len(split.labels),), generator=torch.Generator().manual_seed(seed))
    images = split.images.clone()
    for turn in (1, 2, 3):
        images[turns == turn] = images[turns == turn].rot90(turn, (1, 2))
    return Split(images, split.labels * 4 + turns)


def paired(split: Split, seed: int) -> Split:
    """Put another random image on the right of each; each pair of 10 classes becomes one of 100 classes."""
    right = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    images = torch.cat((split.images, split.images[right]), dim=2)
    return Split(images, split.labels * 10 + split.labels[right])


def halved(split: Split, seed: int) -> Split:
    """Average each 2x2 pixels of the images."""
    pixels = split.images.movedim(3, 1).float()
    return Split(nn.functional.avg_pool2d(pixels, 2).round().to(torch.uint8).movedim(1, 3).contiguous(), split.labels)


# Name -> function, and how many classes it makes of one.
CHANGED_DATA: dict[str, tuple[Callable[[Split, int], Split], int]] = {
    "rotations": (rotated, 4), "pairs": (paired, 10), "halves": (halved, 1),
}  # fmt: skip


def run_cell(task: dict[str, Any]) -> dict[str, Any]:
    """Train one cell with one seed, and return its row for the file."""
    name, settings = task["cell"], dict(task["settings"])
    change, factor = CHANGED_DATA[settings.pop("change")] if "change" in settings else (None, 1)
    settings["epochs"] = math.ceil(settings["epochs"])
    run = run_config(**settings | task["machine"] | {"seed": task["seed"]})
    data = clean = make_data(replace(run, label_noise=0.0))
    if change:
        classes = [str(i) for i in range(factor * len(data.classes))]
        data = clean = data._replace(train=change(data.train, 0), test=change(data.test, 1), classes=classes)
    if run.label_noise:
        data = add_label_noise(data, run.label_noise, run.seed)
    torch.manual_seed(run.seed)
    network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    change_heads(name, network)
    shape, stages = (data.in_channels, *data.image_size), network.depth
    operations = {
        "plain_operations": exit_operations(network.plain() if stages > 1 else network, shape)[-1],
        "training_operations": training_operations(network, run.method, shape),
    }
    if stages > 1:
        operations["exit_operations"] = exit_operations(network, shape)
    trainer = Trainer(network, data, make_config(run), quiet=True)
    use_teacher(name, network)
    evaluate_sometimes(trainer, task["evaluations"])
    start = time.monotonic()
    rows = trainer.fit()
    last = rows[-1]
    result = {
        "table": task["table"], "cell": name, "seed": task["seed"],
        "stages": last["stage_accuracy"], "kl": last["stage_kl"], "certificate": last["certificate"],
        "train_accuracy": last["train_accuracy"], "test_by_epoch": [row["test_accuracy"] for row in rows],
        "activation_bytes": last["activation_bytes"], "peak_memory_bytes": last["peak_memory_bytes"],
        "training_seconds": last["elapsed"], "seconds": time.monotonic() - start, **operations,
    }  # fmt: skip
    test = trainer.strategy.batches["test"]
    options = trainer.strategy.options
    if stages > 1:
        result["plain"] = accuracy(network.plain(), test.in_order(), options)
        result["averaged"] = accuracy(network.averaged, test.in_order(), options)
        costs = torch.tensor(operations["exit_operations"])
        result["exit"] = [
            {"confidence": confidence, "accuracy": reached, "operations": float(torch.tensor(shares) @ costs)}
            for confidence, (reached, shares) in zip(
                CONFIDENCES, exit_curve(network, test.in_order(), options, CONFIDENCES), strict=True
            )
        ]
    if run.label_noise:
        wrong = (data.train.labels != clean.train.labels).nonzero()[:, 0]
        strategy = trainer.strategy
        mean, std = strategy.pixel_mean, strategy.pixel_std
        batches = Batches(data.train.take(wrong), run.batch_size, strategy.device, mean, std)
        result["wrong_labels_learned"] = accuracy(network, batches.in_order(), options)
    return result


def evaluate_sometimes(trainer: Trainer, evaluations: int) -> None:
    """Make the trainer evaluate after about so many of its epochs, the last among them, and reuse that in others."""
    evaluate, epochs, latest = trainer.evaluate, trainer.config.epochs, []

    def evaluated() -> Any:
        if not latest or (epochs - trainer.epoch) % max(1, epochs // evaluations) == 0:
            latest[:] = [evaluate()]
        return latest[0]

    trainer.evaluate = evaluated  # type: ignore[method-assign]  # for this run alone


# ---------------------------------------------------------------- all runs


def serve(tasks: Any, results: Any, threads: int) -> None:
    """Run the tasks of a queue until it ends with None, and put their results into another. Runs in its own process."""
    torch.set_num_threads(threads)
    while (task := tasks.get()) is not None:
        try:
            results.put(run_cell(task))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            results.put(
                {"table": task["table"], "cell": task["cell"], "seed": task["seed"], "failed": record.scrub(reason)}
            )


def make_tasks(args: argparse.Namespace, done: Sequence[dict]) -> list[dict[str, Any]]:
    """Return the runs that are still to make, table by table and seed by seed."""
    kept = {(run["table"], run["cell"], run["seed"]) for run in done}
    shared = {"data": args.data, "cache": args.cache, "device": args.device, "dtype": args.dtype, "graph": args.graph}
    tasks = []
    for part in args.tables:
        table, _, seeds = part.partition("=")
        common, cells = TABLES[table]
        for seed in map(int, seeds.split(",")) if seeds else args.seeds:
            for cell, settings in cells.items():
                if args.cells and cell not in args.cells or (table, cell, seed) in kept:
                    continue
                merged = common | settings
                epochs = settings["epochs"] * common["epochs"] if "epochs" in settings else common["epochs"]
                merged["epochs"] = min(epochs, args.most_epochs or epochs)
                if args.most_images:
                    merged["train_images"] = min(args.most_images, merged.get("train_images") or args.most_images)
                machine = shared | ({"data": args.mnist} if common["dataset"] == "mnist" else {})
                tasks.append({
                    "table": table, "cell": cell, "seed": seed, "settings": merged, "machine": machine,
                    "evaluations": args.evaluations,
                })  # fmt: skip
    return tasks


def summarize(runs: Sequence[dict]) -> str:
    """Return the tables as Markdown: mean and sample deviation over the seeds, in %."""
    lines = []
    runs = [run for run in runs if "failed" not in run]
    for table in dict.fromkeys(run["table"] for run in runs):
        lines += ["", f"### {table}", ""]
        lines.append("| | seeds | stages | last | plain | averaged | certificate | training operations | activations |")
        lines.append("|---|---|---|---|---|---|---|---|---|")
        base = [run for run in runs if run["table"] == table and run["cell"] == "bp"]
        for cell in dict.fromkeys(run["cell"] for run in runs if run["table"] == table):
            group = [run for run in runs if run["table"] == table and run["cell"] == cell]
            stages = " ".join(
                f"{100 * statistics.mean(values):.1f}" for values in zip(*(r["stages"] for r in group), strict=True)
            )
            certificate = " ".join(
                f"{100 * statistics.mean(v):.0f}" for v in zip(*(r["certificate"] for r in group), strict=True)
            )
            columns = [cell, str(len(group)), stages, spread([run["stages"][-1] for run in group])]
            columns += [spread([run[key] for run in group if key in run]) for key in ("plain", "averaged")]
            columns += [certificate if "plain" in group[0] else ""]
            for key in ("training_operations", "activation_bytes"):
                columns.append(f"{group[0][key] / base[0][key]:.2f}" if base else f"{group[0][key]:.3g}")
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation of fractions as text, in %."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="CIFAR-10: an image folder, or the root of cifar-10-batches-py")
    add("--mnist", help="MNIST: the root of torchvision's files")
    add("--cache", help="folder for the decoded images")
    add(
        "--tables", nargs="+", metavar="TABLE[=SEED,...]", default=["cifar10-10k"],
        help=f"tables to make, in this order: {', '.join(TABLES)} (default: cifar10-10k)",
    )  # fmt: skip
    add("--cells", nargs="+", help="names of cells (default: all of each table)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--device", default="auto", help="(default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: bfloat16)")
    add("--graph", action="store_true", help="on a GPU, run each step as one CUDA graph")
    add("--jobs", type=int, default=1, help="processes (default: 1)")
    add("--threads", type=int, default=1, help="threads of each process (default: 1)")
    add("--seconds", type=float, default=math.inf, help="stop after this time and discard unfinished runs")
    add("--most-images", type=int, help="use at most this many training images, to try things out")
    add("--most-epochs", type=int, help="train at most this many epochs, to try things out")
    add("--evaluations", type=int, default=12, help="evaluate after about so many epochs of each run (default: 12)")
    add("--print", action="store_true", help="train nothing: print the tables of --out")
    add("--out", type=Path, required=True, help="the JSON file to write, or to continue")
    args = parser.parse_args(argv)
    for table in (part.partition("=")[0] for part in args.tables):
        if table not in TABLES:
            parser.error(f"--tables must be among {', '.join(TABLES)}, not {table!r}")
    start = time.monotonic()
    filed = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    if not args.print:
        tasks = make_tasks(args, filed["runs"])
        train_all(args, tasks, filed, start)
    print(summarize(filed["runs"]))
    for run in filed["runs"]:
        if "failed" in run:
            print(f"failed: {run['table']}, {run['cell']}, seed {run['seed']}: {run['failed']}")
    return 0


def train_all(args: argparse.Namespace, tasks: list[dict], filed: dict, start: float) -> None:
    """Run the tasks in `args.jobs` processes and write the JSON file after each."""
    for dataset, data in {(task["settings"]["dataset"], task["machine"]["data"]) for task in tasks}:
        make_data(run_config(dataset=dataset, data=data, cache=args.cache))  # decodes the image files once for all runs
    context = multiprocessing.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    for task in [*tasks, *[None] * args.jobs]:
        queue.put(task)
    workers = [context.Process(target=serve, args=(queue, results, args.threads)) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    header = record.header("accuracy of methods over seeds, after the last epoch")
    filed |= {"headers": [*filed.get("headers", []), header | {"dtype": args.dtype, "graph": args.graph}]}
    for number in range(1, len(tasks) + 1):
        while results.empty():
            if time.monotonic() - start > args.seconds or not any(worker.is_alive() for worker in workers):
                print(f"stopped with {number - 1} of {len(tasks)} runs done", flush=True)
                for worker in workers:
                    worker.kill()
                return
            time.sleep(0.05)
        run = results.get()
        filed["runs"].append(run | {"header": len(filed["headers"]) - 1})
        record.write_json(args.out, filed)
        outcome = run.get("failed") or f"{100 * run['stages'][-1]:.2f}% in {run['seconds']:.0f} s"
        print(f"[{number}/{len(tasks)}] {run['table']}, {run['cell']}, seed {run['seed']}: {outcome}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
