"""The settings of a run: `TrainConfig`, how to train, and `RunConfig`, also which network on which data.

Every setting is checked here, before anything is read or made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..methods.common import DIVERGENCES, STEP_SCHEDULES
from ..methods.factory import BACKPROPAGATED, CROSS_ENTROPY, LOCAL, LR_SCHEDULES, METHODS, OPTIMIZERS
from ..network.architectures import stage_count

PARALLEL = ("none", "data", "shard", "stage")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what is trained, and on what, are the network and the data."""

    method: str = "sid"
    schedule: str = "one-pass"
    fused: bool = True  # equal plain stages in one kernel; off, one stage's activations at a time
    epochs: int = 5
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3  # the highest, where it changes
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    alpha: float | Sequence[float] = 0.5  # one number, or one a stage
    divergence: str = "forward"
    label_smoothing: float = 0.0
    seed: int = 0  # of the order, crops and flips; the network is drawn before it comes here
    dtype: str = "float32"
    device: str = "auto"
    channels_last: bool = True
    streams: bool = True  # on a GPU, a stream a stage
    graph: bool = False  # on a GPU, the step as one CUDA graph
    workers: int = 2  # processes that decode, for data that is not held in memory
    save_every: int = 0  # steps between checkpoints; 0: after every epoch only

    def __post_init__(self):
        tables = (
            ("method", METHODS), ("schedule", STEP_SCHEDULES), ("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES),
            ("divergence", DIVERGENCES), ("dtype", DTYPES),
        )  # fmt: skip
        for name, table in tables:
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, not {getattr(self, name)!r}")
        least = {"epochs": 1, "batch_size": 1, "workers": 0, "save_every": 0, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        for alpha in self.alpha if isinstance(self.alpha, Sequence) else [self.alpha]:
            if not isinstance(alpha, str) and not 0 <= alpha <= 1:  # a text is RunConfig's
                raise ValueError(f"alpha must be in [0, 1], not {alpha}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if self.divergence == "reverse" and not self.label_smoothing:
            raise ValueError("divergence 'reverse' needs label_smoothing above 0: labels must have full support")
        for name, value in CROSS_ENTROPY.items() if self.method != "sid" else ():
            object.__setattr__(self, name, value)


# A strong recipe for backpropagation on the network, and the same for every method it is compared with.
RECIPES: dict[str, dict[str, Any]] = {
    "simple_cnn": {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 5e-4, "lr_schedule": "one-cycle"},
    "vgg11": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "lr_schedule": "one-cycle"},
    "resnet18": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "lr_schedule": "one-cycle"},
    "vit_tiny": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "lr_schedule": "one-cycle"},
    "mlp": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 5e-4, "lr_schedule": "one-cycle"},
}


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """Everything a run is made of: `TrainConfig`, the data and the network. All of it is in the run's config.json."""

    dataset: str = "digits"
    data: str | None = None
    cache: str | None = None
    download: bool = False
    image_size: int | None = None
    stream: bool | None = None
    train_images: int | None = None
    val: float = 0.0
    label_noise: float = 0.0
    crop: int | None = None  # None, here and for flip: what suits the data set
    flip: bool | None = None
    arch: str = "simple_cnn"
    layout: str = "shared"
    depth: int | None = None
    head_depth: int = 1
    hidden_dim: int = 256
    grid: int = 4
    alpha: float | str | Sequence[float] = 0.5  # type: ignore[assignment]  # also a text that `alpha_by_depth` takes
    parallel: str = "none"  # how the processes that torchrun started share the work
    replicas: int = 1  # of the pipeline, each with a share of every batch
    stages_per_rank: Sequence[int] | None = None  # None: balanced by what the stages cost
    in_flight: int = 2  # batches on their way between two ranks
    timeout: float = 600.0  # seconds after which a silent rank counts as lost

    def __post_init__(self):
        object.__setattr__(self, "alpha", parse_alpha(self.alpha))
        super().__post_init__()
        if self.stages_per_rank is not None:
            object.__setattr__(self, "stages_per_rank", tuple(self.stages_per_rank))
        check_parallel(self)
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise must be in [0, 1], not {self.label_noise}")
        if not 0 <= self.val < 1:
            raise ValueError(f"val must be in [0, 1), not {self.val}")
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images must be at least 1, not {self.train_images}")
        if self.crop is not None and self.crop < 0:
            raise ValueError(f"crop must be 0 or more, not {self.crop}")
        if self.flip and self.dataset in ("digits", "mnist"):
            raise ValueError(f"flip makes no sense for {self.dataset}: a mirrored digit is not that digit")
        if self.data is not None and self.dataset == "digits":
            raise ValueError("data means nothing for digits; the other data sets read files")


def check_parallel(run: RunConfig) -> None:
    if run.parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, not {run.parallel!r}")
    for name, lowest in {"replicas": 1, "in_flight": 1, "timeout": 1}.items():
        if getattr(run, name) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, not {getattr(run, name)}")
    if run.parallel != "none":
        for name in ("download", "graph"):
            if getattr(run, name):
                raise ValueError(f"{name} is for one process, not for parallel {run.parallel!r}")
    if run.parallel != "stage":
        if run.replicas > 1 or run.stages_per_rank is not None:
            raise ValueError(f"replicas and stages_per_rank mean something for parallel 'stage', not {run.parallel!r}")
    elif run.method not in LOCAL or run.schedule != "one-pass":
        raise ValueError(
            f"parallel 'stage' needs method {' or '.join(LOCAL)} and schedule one-pass, not {run.method!r},"
            f" {run.schedule!r}"
        )
    elif run.layout == "shared":
        raise ValueError(
            "parallel 'stage' needs layout 'stagewise', not 'shared'; a shared network takes parallel 'data'"
        )
    if run.parallel in ("data", "shard") and run.method == "bp-checkpoint":
        raise ValueError(f"method 'bp-checkpoint' cannot recompute with parallel {run.parallel!r}")


# Settings that say where and with what help a run is made; all others make it another run.
PROCESSES = ("parallel", "replicas", "stages_per_rank", "in_flight", "timeout")
MOVABLE = ("data", "cache", "download", "device", "workers", "save_every", *PROCESSES)


def run_config(**given: Any) -> RunConfig:
    """Return the settings of a run; what is not given (or None) comes from the network's recipe, then the default."""
    given = {name: value for name, value in given.items() if value is not None}
    recipe: dict[str, Any] = RECIPES.get(given.get("arch", RunConfig.arch), {})
    epochs = {"epochs": 30 if given.get("dataset", "digits") == "digits" else 5}
    return RunConfig(**epochs | recipe | given)


def parse_alpha(given: float | str | Sequence[float]) -> float | tuple[float, ...] | str:
    """Parse alpha: a number; "0.9,0.5,0.3", one a stage; or "0.9:0.3", linear over depth, which stays a string."""
    if not isinstance(given, str):
        return given if isinstance(given, float | int) else tuple(given)
    try:
        numbers = tuple(float(part) for part in given.replace(":", ",").split(","))
    except ValueError:
        numbers = ()
    if not numbers or (":" in given and len(numbers) != 2) or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f"alpha must be a number in [0, 1], FIRST:LAST, or one number a stage (0.9,0.5,...), not {given!r}"
        )
    return given if ":" in given else numbers[0] if len(numbers) == 1 else numbers


def alpha_by_depth(alpha: float | str | Sequence[float], depth: int) -> list[float]:
    """Return one alpha for each of `depth` stages. Raises ValueError for another number of values."""
    alpha = parse_alpha(alpha)
    if isinstance(alpha, tuple) and len(alpha) != depth:
        raise ValueError(f"alpha must be one number or one for each of the {depth} stages, not {len(alpha)}")
    if isinstance(alpha, str):
        first, last = map(float, alpha.split(":"))
        return torch.linspace(first, last, depth, dtype=torch.float64).tolist()
    return [alpha] * depth if isinstance(alpha, float | int) else list(alpha)


def is_plain(run: RunConfig) -> bool:
    """Return whether the run trains the plain backbone with one classifier."""
    return run.layout == "stagewise" and run.method in BACKPROPAGATED


def stage_alphas(run: RunConfig) -> list[float]:
    """Return alpha for each stage of the run's network. Raises ValueError for a depth or number it cannot have."""
    depth = stage_count(run.arch, run.layout, run.depth)
    return alpha_by_depth(run.alpha, 1 if is_plain(run) else depth)
