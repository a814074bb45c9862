"""Simulate pipelines over more ranks than this machine has, from stage costs that are measured on it.

    python bench/pipeline/simulate.py --arch mlp --depth 64 --ranks 2 8 64 --bandwidth 10 --latency 20

It prints a table of every schedule at every number of ranks, and writes simulate.json and simulate.png. Nothing is
trained. `--costs FILE` keeps the measured costs, so that a second call measures nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.pipeline.costs import StageCost, StepSettings, load_or_measure, write_json
from bench.pipeline.figures import draw_outlook
from bench.pipeline.simulator import SCHEDULES, NetworkLink, Simulation, simulate
from sid_trainer.distributed.balance import balance_stages
from sid_trainer.files import write_atomically
from sid_trainer.methods.factory import OPTIMIZERS
from sid_trainer.network.architectures import TRUNKS
from sid_trainer.training.config import DTYPES

MICROBATCHES = (4, 8, 16, 32)  # tried by default if they divide the batch and leave two images each
DRAWN_RANKS = 16  # larger pipelines are drawn only if --ranks has no smaller one; the table shows all
COLUMNS = {
    "schedule": lambda row: row["schedule"],
    "ranks": lambda row: str(row["ranks"]),
    "microbatches": lambda row: str(row["microbatches"]),
    "images/s": lambda row: f"{row['images_per_second']:.0f}",
    "× one rank": lambda row: f"{row['gain']:.2f}",
    "idle": lambda row: f"{row['idle']:.1%}",
    "(S−1)/(N+S−1)": lambda row: f"{row['formula']:.1%}",
    "imbalance": lambda row: f"{row['imbalance']:.1%}",
    "held, MiB": lambda row: f"{row['held'] / 2**20:.2f}",
}


@dataclass(frozen=True)
class Sweep:
    """The pipelines to simulate.

    batches: number per epoch. `sid` drains its pipeline after an epoch, the other schedules after every batch.
    microbatches: numbers to try, of which the fastest is reported. in_flight: batches on their way between two ranks.
    """

    ranks: Sequence[int]
    schedules: Sequence[str]
    batches: int = 400
    microbatches: Sequence[int] | None = None
    link: NetworkLink = NetworkLink()
    in_flight: int = 2

    def check(self, batch_size: int) -> None:
        """Raise ValueError if the pipelines are impossible for batches of this size."""
        for m in self.microbatches or ():
            if m < 1 or batch_size % m:
                raise ValueError(f"microbatches must divide the batch of {batch_size} images, not be {m}")
        for name, value in (("batches", self.batches), ("in_flight", self.in_flight), ("ranks", min(self.ranks))):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


def outlook(
    settings: StepSettings, sweep: Sweep, out: Path | None = None, costs: Path | None = None, rounds: int = 10
) -> list[dict]:
    """Return a row for each schedule and number of ranks; with `out`, write simulate.json and simulate.png there.

    costs: a JSON file of measured costs, which is written if it does not exist.

    Raises ValueError for wrong arguments and OSError for files, before it measures if that is possible.
    """
    size = settings.batch_size
    sweep.check(size)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    microbatches = sweep.microbatches
    if microbatches is None:
        microbatches = [m for m in MICROBATCHES if size % m == 0 and size >= 2 * m] or [1]
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder")
    with torch.random.fork_rng([]):
        stages = len(settings.network(plain=False).stages)
    balance_stages([1.0] * stages, max(sweep.ranks))
    measured = load_or_measure(
        settings, sorted({1, *microbatches}) if set(sweep.schedules) - {"sid"} else [], costs, rounds
    )
    rows, drawn = [], {}
    for schedule in sweep.schedules:
        one_rank = None
        for ranks in sorted({1, *sweep.ranks}):
            counts = [1] if schedule == "sid" or ranks == 1 else microbatches
            names = ["sid"] if schedule == "sid" else [f"bp/{m}" for m in counts]
            simulations = [
                extrapolate(measured[name], ranks, schedule, m, sweep) for name, m in zip(names, counts, strict=True)
            ]
            simulation, seconds = min(simulations, key=lambda pair: pair[1])
            rate = sweep.batches * size / seconds
            one_rank = one_rank or rate
            rows.append({
                "schedule": schedule, "ranks": ranks, "microbatches": simulation.microbatches,
                "images_per_second": rate, "gain": rate / one_rank,
                "idle": 1 - sweep.batches / simulation.batches * sum(simulation.busy) / (ranks * seconds),
                "formula": simulation.ideal_idle_share, "imbalance": simulation.imbalance,
                "held": max(simulation.held),
            })  # fmt: skip
            drawn[schedule, ranks] = simulation
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        link = {name: None if value == float("inf") else value for name, value in asdict(sweep.link).items()}
        record = {"of": asdict(settings), "link": link, "batches": sweep.batches, "rows": rows}
        write_json(out / "simulate.json", record)
        picture = draw(drawn, rows, sweep.ranks)
        write_atomically(out / "simulate.png", lambda file: file.write(picture))
    return rows


def extrapolate(
    costs: Sequence[StageCost], ranks: int, schedule: str, m: int, sweep: Sweep
) -> tuple[Simulation, float]:
    """Return a simulation of the first batches, and the seconds that all `sweep.batches` take.

    `sid` is simulated for all batches. The other schedules drain after each batch, so each batch after the first few
    takes the same time: 5 batches are simulated.
    """
    parts = balance_stages([cost.seconds + (m - 1) * (cost.forward + cost.backward) for cost in costs], ranks)
    few = sweep.batches if schedule == "sid" else min(sweep.batches, 5)

    def run(batches: int) -> Simulation:
        options = {"link": sweep.link, "in_flight": sweep.in_flight}
        return simulate(costs, parts, schedule, batches, microbatches=m, **options)

    simulation = run(few)
    if few == sweep.batches:
        return simulation, simulation.seconds
    per_batch = simulation.seconds - run(few - 1).seconds
    return simulation, simulation.seconds + (sweep.batches - few) * per_batch


def draw(simulations: dict[tuple[str, int], Simulation], rows: list[dict], ranks: Sequence[int]) -> bytes:
    """Draw each schedule at the largest number of ranks up to DRAWN_RANKS, and the throughput of all simulations."""
    candidates = sorted({number for number in ranks if number > 1} or {1})
    number = max((n for n in candidates if n <= DRAWN_RANKS), default=candidates[0])
    shown = {schedule: run for (schedule, at), run in simulations.items() if at == number}
    # The time axis ends when the slowest schedule has finished its third batch, or where the first simulation ends.
    thirds = [[event.end for event in run.events if event.batch == min(2, run.batches - 1)] for run in shown.values()]
    until = min(max(map(max, thirds)), *(run.seconds for run in shown.values()))
    pipelines = []
    for schedule, run in shown.items():
        cut = f", a batch in {run.microbatches}" if run.microbatches > 1 else ""
        title = f"{schedule}, {number} rank{'s' * (number > 1)}{cut}"
        pipelines.append((title, [event for event in run.events if event.start < until]))
    return draw_outlook(pipelines, until, rows)


# ---------------------------------------------------------------- command line


HELP = {
    "depth": "number of stages (default: that of the architecture)",
    "image_size": "pixels on each side (default: 32)",
    "in_channels": "color channels of the images (default: 3)",
    "num_classes": "(default: 10)",
    "head_depth": "hidden layers of each stage head (default: 1)",
    "hidden_dim": "width of the hidden layers (default: 256)",
    "grid": "heads read features pooled to GRID x GRID (default: 4)",
}


class Parser(argparse.ArgumentParser):
    """Parse a command line; a wrong argument ends the program with one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="simulate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[2, 4], help="ranks, each with its own GPU or machine (default: 2 4)")
    add("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="(default: all)")
    add("--batches", type=int, default=400, help="batches per epoch (default: 400, about CIFAR-10's at batch size 128)")
    add("--microbatches", nargs="+", type=int, metavar="M",
        help="parts of a batch to try under backpropagation; the fastest is reported (default: 4 8 16 32)")  # fmt: skip
    add("--bandwidth", type=float, metavar="GBIT/S", help="bandwidth of a link in each direction (default: unlimited)")
    add("--latency", type=float, default=0.0, metavar="MICROSECONDS", help="latency of a message (default: 0)")
    add("--in-flight", type=int, default=2, metavar="N", help="batches on their way between two ranks (default: 2)")
    add("--costs", metavar="FILE", type=Path, help="read the stage costs from this file, or write them to it")
    add("--rounds", type=int, default=10, help="steps to average a cost over (default: 10)")
    add("--out", metavar="DIR", type=Path, default=Path("simulate"), help="folder for the results (default: simulate)")
    group = parser.add_argument_group("the network and step to measure, on synthetic images")
    choices = {"arch": TRUNKS, "optimizer": OPTIMIZERS, "dtype": DTYPES}
    for field in fields(StepSettings):
        flag = "--" + field.name.replace("_", "-")
        kind = int if field.name == "depth" else type(field.default)
        text = HELP.get(field.name, f"(default: {field.default})")
        group.add_argument(flag, type=kind, choices=choices.get(field.name), default=field.default, help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 for a wrong argument or file, which is reported in one line."""
    try:
        args = parse(arguments)
    except SystemExit as end:
        return end.code
    try:
        settings = StepSettings(**{field.name: getattr(args, field.name) for field in fields(StepSettings)})
        speed = {} if args.bandwidth is None else {"bytes_per_second": args.bandwidth * 1e9 / 8}
        link = NetworkLink(args.latency * 1e-6, **speed)
        sweep = Sweep(args.ranks, args.schedule, args.batches, args.microbatches, link, args.in_flight)
        rows = outlook(settings, sweep, args.out, args.costs, args.rounds)
    except (ValueError, OSError) as error:
        print(f"simulate.py: error: {error}", file=sys.stderr)
        return 2
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(text(row) for text in COLUMNS.values())} |")
    print(f"written: {args.out / 'simulate.json'} and simulate.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
