"""`sid simulate`: what more ranks would gain, from costs measured once: every schedule at every number of ranks, as a
table and a picture. It trains nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..distributed.balance import StageCost, balanced, measure_blocks, measure_stages
from ..files import write_atomically
from ..network.architectures import build_network
from ..report.results import read_json
from ..training.config import DTYPES
from ..training.trainer import pick_device
from .simulate import Link, Simulated, simulate

MICROBATCHES = (4, 8, 16, 32)  # those tried by default, where they divide the batch and leave two images each
DRAWN_RANKS = 16  # more are told in the table, and drawn only where nothing smaller was asked for


@dataclass(frozen=True)
class Measured:
    """The network whose stages are timed, and the step: synthetic images of its shape serve."""

    arch: str = "simple_cnn"
    depth: int | None = None
    batch_size: int = 128
    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 10
    head_depth: int = 1
    hidden_dim: int = 256
    grid: int = 4
    optimizer: str = "adam"
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self):
        for name in ("batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def network(self, plain: bool):
        return build_network(
            self.arch, "stagewise", num_classes=self.num_classes, in_channels=self.in_channels,
            image_size=(self.image_size, self.image_size), depth=self.depth, plain=plain, head_depth=self.head_depth,
            hidden_dim=self.hidden_dim, grid=self.grid,
        )  # fmt: skip

    def costs(self, microbatches: Sequence[int], rounds: int) -> dict[str, list[StageCost]]:
        """`sid`: of a batch. `bp/M`: backpropagation of one of M microbatches. Random numbers are left as they were."""
        from tqdm import tqdm

        device = pick_device(self.device)
        with torch.random.fork_rng([]):
            networks = [
                self.network(plain).to(device, memory_format=torch.channels_last) for plain in (False, True)
            ]  # fmt: skip
            shape = (self.batch_size, self.in_channels, self.image_size, self.image_size)
            inputs = torch.randn(shape).to(device, memory_format=torch.channels_last)
            targets = torch.randint(self.num_classes, (self.batch_size,)).to(device)
        options = {"optimizer": self.optimizer, "dtype": DTYPES[self.dtype], "rounds": rounds}
        found = {}
        for m in tqdm([None, *microbatches], desc="measuring", unit=" steps", leave=False, disable=None):
            if m is None:
                found["sid"] = measure_stages(networks[0], inputs, targets, **options)
            else:
                part = slice(self.batch_size // m)
                found[f"bp/{m}"] = measure_blocks(networks[1], inputs[part], targets[part], **options)
        return found


def outlook(
    measured: Measured, ranks: Sequence[int], schedules: Sequence[str], out: Path | None = None, *,
    batches: int = 400, microbatches: Sequence[int] | None = None, link: Link | None = None, in_flight: int = 2,
    costs: Path | None = None, rounds: int = 10,
) -> list[dict]:  # fmt: skip
    """A row for each schedule and number of ranks; with `out`, also simulate.json and simulate.png there.

    batches: of an epoch, after which `sid`'s pipeline runs empty (the others' do after every batch). microbatches: the
    counts to try; backpropagation's rows are each of the best. costs: a JSON file to read costs from, or to write to.

    Raises ValueError and OSError, in one line, before anything is measured where that is possible.
    """
    size = measured.batch_size
    if microbatches is None:
        microbatches = [m for m in MICROBATCHES if size % m == 0 and size >= 2 * m] or [1]
    for m in microbatches:
        if m < 1 or size % m:
            raise ValueError(f"microbatches must divide the batch of {size} images, not be {m}")
    for name, value in (("batches", batches), ("rounds", rounds), ("in_flight", in_flight), ("ranks", min(ranks))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder")
    with torch.random.fork_rng([]):
        stages = len(measured.network(plain=False).stages)
    balanced([1.0] * stages, max(ranks))
    cells = sorted({1, *microbatches}) if set(schedules) - {"sid"} else []
    found = known_costs(measured, cells, costs, rounds)
    options = {"link": link or Link(), "in_flight": in_flight}
    rows, drawn = [], {}
    for schedule in schedules:
        alone = None
        for number in sorted({1, *ranks}):
            tries = [1] if schedule == "sid" or number == 1 else microbatches
            names = ["sid"] if schedule == "sid" else [f"bp/{m}" for m in tries]
            runs = [
                run_of(found[name], number, schedule, batches, m, options)
                for name, m in zip(names, tries, strict=True)
            ]  # fmt: skip
            run, seconds = min(runs, key=lambda run: run[1])
            rate = batches * size / seconds
            alone = alone or rate
            rows.append({
                "schedule": schedule, "ranks": number, "microbatches": run.microbatches, "images_per_second": rate,
                "gain": rate / alone, "idle": 1 - batches / run.batches * sum(run.busy) / (number * seconds),
                "formula": run.formula, "imbalance": run.imbalance, "held": max(run.held),
            })  # fmt: skip
            drawn[schedule, number] = run
    if out is not None:
        write(out, measured, rows, drawn, options["link"], ranks, batches)
    return rows


def run_of(
    costs: Sequence[StageCost], ranks: int, schedule: str, batches: int, m: int, options: dict
) -> tuple[Simulated, float]:
    """A run, and the seconds of `batches` batches. A pipeline that runs empty after each takes the same time for every
    one after the first few, so no more of those are run."""
    parts = balanced([cost.seconds + (m - 1) * (cost.forward + cost.backward) for cost in costs], ranks)
    few = batches if schedule == "sid" else min(batches, 5)
    run = simulate(costs, parts, schedule, few, microbatches=m, **options)
    if few == batches:
        return run, run.seconds
    before = simulate(costs, parts, schedule, few - 1, microbatches=m, **options)
    return run, run.seconds + (batches - few) * (run.seconds - before.seconds)


# ---------------------------------------------------------------- files


def known_costs(
    measured: Measured, microbatches: Sequence[int], file: Path | None, rounds: int
) -> dict[str, list[StageCost]]:
    """What `file` holds; measured, and written there, where there is none."""
    if file is None or not file.exists():
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: no such folder")
        found = measured.costs(microbatches, rounds)
        if file is not None:
            record = {"of": asdict(measured), "torch": str(torch.__version__), "threads": torch.get_num_threads()}
            if (device := pick_device(measured.device)).type == "cuda":
                record["gpu"] = torch.cuda.get_device_name(device)
            costs = {name: [asdict(cost) for cost in stages] for name, stages in found.items()}
            write_json(file, record | {"costs": costs})
        return found
    record = read_json(file)
    try:
        of = record["of"]
        found = {name: [StageCost(**cost) for cost in stages] for name, stages in record["costs"].items()}
        numbers = [value for stages in found.values() for cost in stages for value in asdict(cost).values()]
        if not all(value is None or value >= 0 for value in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not what `sid simulate --costs` writes") from error
    asked = asdict(measured)
    for name in asked.keys() - {"device"}:
        if of.get(name) != asked[name]:
            raise ValueError(f"{file}: was measured with {name} {of.get(name)}, not {asked[name]}: choose another file")
    for name in ["sid", *(f"bp/{m}" for m in microbatches)]:
        if name not in found:
            raise ValueError(f"{file}: holds no costs for {name}, only for {', '.join(found)}: choose another file")
    return found


def write_json(file: Path, record: dict) -> None:
    write_atomically(file, lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))


def write(
    out: Path, measured: Measured, rows: list[dict], drawn: dict, link: Link, ranks: Sequence[int], batches: int
) -> None:
    from ..report.pipeline_figures import draw_outlook

    several = sorted({number for number in ranks if number > 1} or {1})
    number = max((n for n in several if n <= DRAWN_RANKS), default=several[0])
    runs = {schedule: run for (schedule, at), run in drawn.items() if at == number}
    # until the slowest is through with its third batch, and no run of few batches is over
    thirds = [[event.end for event in run.events if event.batch == min(2, run.batches - 1)] for run in runs.values()]
    until = min(max(map(max, thirds)), *(run.seconds for run in runs.values()))
    pipelines = []
    for schedule, run in runs.items():
        cut = f", a batch in {run.microbatches}" if run.microbatches > 1 else ""
        title = f"{schedule}, {number} rank{'s' * (number > 1)}{cut}"
        pipelines.append((title, [event for event in run.events if event.start < until]))
    picture = draw_outlook(pipelines, until, rows)
    out.mkdir(parents=True, exist_ok=True)
    about = {"of": asdict(measured), "link": asdict(link), "batches": batches, "rows": rows}
    if link.bytes_per_second == float("inf"):
        about["link"]["bytes_per_second"] = None  # JSON has no infinity
    write_json(out / "simulate.json", about)
    write_atomically(out / "simulate.png", lambda file: file.write(picture))


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
