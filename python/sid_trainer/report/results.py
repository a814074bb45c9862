"""What runs left in their folders: reading it, grouping runs that differ in nothing but the seed, the table of methods.

It draws and writes nothing.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import PIPELINE
from ..methods.factory import METHODS  # in the order they are shown
from ..training.config import MOVABLE

FAMILY = ("arch", "layout", "method", "label_noise")  # what the table of methods tells apart first
# what every epoch's row has beside its number, and what only those of newer runs have
NUMBERS, LISTS = ("train_loss", "test_accuracy"), ("stage_accuracy", "stage_kl")
NUMBERS_OF_SOME = ("elapsed", "seconds", "images_per_second", "activation_bytes", "peak_memory_bytes")
LISTS_OF_SOME = ("certificate",)
# what may differ between two runs of one group: the seed, who started it, where files lie, how often it is saved
NOT_SETTINGS = {"seed", "run", "threads", "torchrun", *MOVABLE} - {"device"}
FOLLOWS = {
    "num_parameters",
    "classes",
    "in_channels",
    "pixel_mean",
    "pixel_std",
}  # from other settings, so never named where those are


@dataclass(frozen=True)
class Run:
    """A run as read from its folder: `config` of config.json, `rows` of metrics.jsonl, one dict an epoch."""

    name: str
    config: dict
    rows: list[dict]
    pipeline: dict | None = None  # what its pipeline.json holds, where ranks shared the stages

    @property
    def last(self) -> dict:
        return self.rows[-1]

    @property
    def depth(self) -> int:
        """Stages that answer: 1 for a plain network."""
        return len(self.last["stage_accuracy"])

    def series(self, key: str) -> list | None:
        """Return a key's value in every epoch, or None if an epoch lacks it."""
        values = [row.get(key) for row in self.rows]
        return None if None in values else values

    @property
    def elapsed(self) -> list[float] | None:
        """Seconds of training up to each epoch's end."""
        seconds = self.series("seconds")
        summed = seconds and [sum(seconds[: epoch + 1]) for epoch in range(len(seconds))]
        return self.series("elapsed") or summed

    @property
    def certificate(self) -> list[float] | None:
        """The last epoch's certificate rate by stage; None for one stage, which has no earlier one to improve on."""
        return self.last.get("certificate") if self.depth > 1 else None

    @property
    def images_per_second(self) -> float | None:
        """The median over epochs."""
        rates = self.series("images_per_second")
        return statistics.median(rates) if rates else None

    def most(self, key: str) -> int | None:
        """Return the largest value of a key over all epochs."""
        values = self.series(key)
        return max(values) if values else None

    @property
    def ideal(self) -> list[float] | None:
        """KL by stage of the ideal cascade; None where it is not known, or 0 (alpha = 1, hard labels)."""
        config = self.config
        if config["method"] != "sid" or config.get("label_noise"):
            return None
        smoothing, divergence = config.get("label_smoothing") or 0.0, config.get("divergence", "forward")
        if isinstance(config["alpha"], list) and len(config["alpha"]) != self.depth:
            return None
        ideal = ideal_kl(config["alpha"], len(config["classes"]), self.depth, smoothing, divergence)
        return ideal if min(ideal) > 0 else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    runs: list[Run]
    variant: str = ""  # the settings that set it apart from groups of the same FAMILY

    @property
    def family(self) -> tuple:
        """Architecture, layout, method and label noise (0 where the run does not say)."""
        arch, layout, method, noise = (self.runs[0].config.get(key) for key in FAMILY)
        return arch, layout, method, noise or 0.0


def load_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Read every folder once. Raises ValueError, in one line that names the file, where one holds no run."""
    folders = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not folders:
        raise ValueError("folders: no run's folder was given")
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        rows, config = read_run(folder)
        name = shown(name if names.count(name) == 1 else str(folder))
        shared = "pipeline" in rows[-1]  # else pipeline.json, if it is there, shows an earlier epoch, or another run's
        runs.append(Run(name, config, rows, read_pipeline(folder) if shared else None))
    return runs


def read_run(folder: Path) -> tuple[list[dict], dict]:
    """Read a run's metrics.jsonl and config.json. Raises ValueError, in one line, if they are not a run's."""
    metrics, about = folder / "metrics.jsonl", folder / "config.json"
    rows = read_json(metrics, lambda text: [json.loads(line) for line in text.splitlines()])
    config = read_json(about)
    needed = {"epoch", *NUMBERS, *LISTS}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(f"{metrics}: holds no whole epoch")
    first = rows[0]["stage_accuracy"]
    depth = len(first) if isinstance(first, list) else 0
    for row in rows:
        row = {key: value for key, value in row.items() if key in needed or value is not None}
        for key in ("epoch", *NUMBERS, *NUMBERS_OF_SOME):
            if not is_number(row.get(key, 0)):
                raise ValueError(f"{metrics}: {key} of epoch {row['epoch']} is not a number")
        for key in (*LISTS, *LISTS_OF_SOME):
            values = row.get(key, first)
            if not (isinstance(values, list) and len(values) == depth > 0 and all(map(is_number, values))):
                raise ValueError(f"{metrics}: {key} of epoch {row['epoch']} is not a list of one number a stage")
    if not isinstance(config, dict) or not {"method", "alpha", "classes"} <= config.keys():
        raise ValueError(f"{about}: not what a run writes")
    alpha = config["alpha"] if isinstance(config["alpha"], list) else [config["alpha"]]
    shares = [*alpha, *(config[key] for key in ("label_noise", "label_smoothing") if config.get(key) is not None)]
    names = [config["method"], *(config[key] for key in ("arch", "layout") if config.get(key) is not None)]
    if not (
        all(is_number(share) and 0 <= share <= 1 for share in shares)
        and all(isinstance(name, str) for name in names)
        and isinstance(config["classes"], list)
        and config["classes"]
    ):
        raise ValueError(f"{about}: not what a run writes (its names, classes, or a share that is not in [0, 1])")
    return rows, config


def read_pipeline(folder: Path) -> dict | None:
    """Read a run's pipeline.json; return None if it has none. Raises ValueError, in one line, if it is something else.

    Each of `ranks` has its number, stages (from 1), seconds busy, waiting to receive, to send and for gradients of
    replicas, bytes, and `batches`: [start, end] in seconds of the first batches of the last epoch.
    """
    file = folder / PIPELINE
    if not file.exists():
        return None
    found = read_json(file)
    ranks = found.get("ranks") if isinstance(found, dict) else None
    numbers = ("rank", "busy", "receiving", "sending", "reducing", "bytes_sent", "peak_memory_bytes")

    def are_numbers(values) -> bool:
        return isinstance(values, list) and len(values) > 0 and all(map(is_finite, values))

    whole = isinstance(ranks, list) and all(
        isinstance(one, dict)
        and all(is_finite(one.get(key)) for key in numbers)
        and are_numbers(one.get("stages"))
        and isinstance(one.get("batches"), list)
        and all(are_numbers(span) and len(span) == 2 for span in one["batches"])
        for one in ranks
    )
    shares = ("bubble", "predicted_bubble", "imbalance")
    if not ranks or not whole or not any(one["batches"] for one in ranks):
        raise ValueError(f"{file}: not what a run writes: each of ranks has {', '.join(numbers)}, stages, batches")
    if not all(found.get(key) is None or is_finite(found[key]) for key in shares):
        raise ValueError(f"{file}: not what a run writes: {', '.join(shares)} must be numbers")
    return found


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value) -> bool:
    return is_number(value) and math.isfinite(value)


def read_json(file: Path, parse: Callable = json.loads):
    """Return what `parse` makes of the file's text. Raises ValueError, in one line that names the file."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not what a run writes ({error})") from error


def ideal_kl(
    alpha: float | Sequence[float],
    num_classes: int,
    depth: int,
    label_smoothing: float = 0.0,
    divergence: str = "forward",
) -> list[float]:
    """Return KL(y || p_i) in nats for hard y of the ideal cascade: each stage at its minimum, given the one before.

    With u uniform, t the smoothed target and r_i the product of (1 - alpha_j) over j <= i, the minimum is
    p_i = (1 - r_i) t + r_i u (forward) or p_i proportional to t^(1 - r_i) (reverse).
    """
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * depth
    if len(alphas) != depth:
        raise ValueError(f"alpha must have one value a stage ({depth}), not {len(alphas)}")
    kept = [math.prod(1 - a for a in alphas[: i + 1]) for i in range(depth)]  # r_i, what is left of the uniform prior
    if divergence == "forward":
        return [-math.log1p(-(1 - (1 - r) * (1 - label_smoothing)) * (1 - 1 / num_classes)) for r in kept]
    if label_smoothing == 0:
        return [0.0] * depth
    odds = math.log1p(num_classes * (1 - label_smoothing) / label_smoothing)  # log(t_y / t_other)
    return [math.log1p((num_classes - 1) * math.exp(-(1 - r) * odds)) for r in kept]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Group runs that differ in the seed only, ordered by architecture, layout, noise and method."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in NOT_SETTINGS}
        found.setdefault(json.dumps([settings, run.depth], sort_keys=True), []).append(run)
    families: dict[tuple, list[list[Run]]] = {}
    for members in found.values():
        families.setdefault(Group(members).family, []).append(members)
    groups = []
    for members_of_one in families.values():
        differing = differing_settings([members[0] for members in members_of_one])
        named = [key for key in differing if key not in {"seed", *FOLLOWS}]
        for members in members_of_one:
            variant = ", ".join(f"{key} {shown(members[0].config.get(key))}" for key in named)
            groups.append(Group(sorted(members, key=seed_of), variant))

    def place(group: Group):
        arch, layout, method, noise = group.family
        return arch or "", layout or "", noise, rank(method)

    return sorted(groups, key=place)


def rank(method: str) -> tuple[int, str]:
    """Return a key that sorts methods in the order of METHODS, and any others after them."""
    return METHODS.index(method) if method in METHODS else len(METHODS), method


def seed_of(run: Run) -> float:
    seed = run.config.get("seed")
    return seed if is_number(seed) else math.inf


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that differ between runs, the seed included, in the order of the settings."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key == "seed" or key not in NOT_SETTINGS)
    return [key for key in keys if len({shown(run.config.get(key)) for run in runs}) > 1]


def shown(value) -> str:
    """Return a setting as short text; a list of equal values, one a stage, is one value."""
    if isinstance(value, list):
        parts = [shown(part) for part in value]
        text = parts[0] if parts and set(parts) == {parts[0]} else ", ".join(parts)
        return text if len(text) <= 60 else f"{text[:60]}… ({len(value)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.encode(errors="replace").decode()  # a file's name need not be Unicode


def comparison_table(runs: Sequence[Run]) -> list[dict]:
    """Return one dict for each group of runs that differ in the seed only.

    Keys: arch, layout, method, label_noise; settings (those that differ from groups with the same four); n; seeds;
    epochs (reached, a sorted list); test_accuracy (mean of the last epochs, in [0, 1]); deviation (of the sample; None
    for one run); images_per_second (median); activation_bytes and peak_memory_bytes (the largest, or None).
    """
    table = []
    for group in grouped(runs):
        accuracies = [run.last["test_accuracy"] for run in group.runs]
        rates = [run.images_per_second for run in group.runs if run.images_per_second is not None]
        most = {
            key: max((run.most(key) for run in group.runs if run.most(key) is not None), default=None)
            for key in ("activation_bytes", "peak_memory_bytes")
        }
        row = dict(zip(FAMILY, group.family, strict=True))
        row |= {
            "settings": group.variant,
            "n": len(group.runs),
            "seeds": [run.config.get("seed") for run in group.runs],
            "epochs": sorted({run.last["epoch"] for run in group.runs}),
            "test_accuracy": statistics.fmean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "images_per_second": statistics.median(rates) if rates else None,
            **most,
        }
        table.append(row)
    return table


def unit_of(count: float) -> tuple[int, str]:
    """Return size and name of the largest unit of bytes that is not larger than `count`."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next(((size, name) for size, name in units if count >= size), (1, "bytes"))


def in_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    size, name = unit_of(count)
    return f"{count / size:.3g} {name}"
