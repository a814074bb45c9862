"""A run from its settings: the data, the network and the trainer that a command or a checkpoint asks for."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from .architectures import build_network, stage_count
from .batches import Batches
from .checkpoint import check_same, load_checkpoint
from .costs import balanced, measure_stages
from .data import ImageData, load_data
from .evaluation import evaluate
from .methods import BACKPROPAGATED, LOCAL
from .network import SIDNetwork
from .processes import PARALLEL, Place, join, own_device, refuse, said_once, tell_all, world_size
from .splits import with_label_noise, with_subset, with_validation
from .trainer import DTYPES, TrainConfig, Trainer

# A strong recipe for backpropagation on the network, and the same for every method it is compared with.
RECIPES = {
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
    alpha: float | str | Sequence[float] = 0.5  # also a text that `alpha_by_depth` takes
    parallel: str = "none"  # how the processes that torchrun started share the work
    replicas: int = 1  # of the pipeline, each with a share of every batch
    stages_per_rank: Sequence[int] | None = None  # None: balanced by what the stages cost
    in_flight: int = 2  # batches on their way between two ranks
    stale: int = 0  # batches whose gradient a shared extractor in a pipeline does not wait for
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
    for name, lowest in {"replicas": 1, "in_flight": 1, "stale": 0, "timeout": 1}.items():
        if getattr(run, name) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, not {getattr(run, name)}")
    if run.parallel != "stage":
        if run.replicas > 1 or run.stages_per_rank is not None:
            raise ValueError(f"replicas and stages_per_rank mean something for parallel 'stage', not {run.parallel!r}")
    elif run.method not in LOCAL or run.schedule != "one-pass":
        raise ValueError(
            f"parallel 'stage' needs method {' or '.join(LOCAL)} and schedule one-pass, not {run.method!r},"
            f" {run.schedule!r}"
        )
    if run.stale and (run.parallel != "stage" or run.layout != "shared" or run.replicas > 1):
        raise ValueError("stale means something for parallel 'stage', layout 'shared' and one replica only")
    if run.parallel == "data" and run.method == "bp-checkpoint":
        raise ValueError("parallel 'data' cannot recompute in the backward pass: method must not be 'bp-checkpoint'")


# Settings that say where and with what help a run is made; all others make it another run.
PROCESSES = ("parallel", "replicas", "stages_per_rank", "in_flight", "timeout")
MOVABLE = ("data", "cache", "download", "device", "workers", "save_every", *PROCESSES)


def run_config(**given) -> RunConfig:
    """A run's settings; what is not given (or None) is the network's recipe, then the default."""
    given = {name: value for name, value in given.items() if value is not None}
    recipe = RECIPES.get(given.get("arch", RunConfig.arch), {})
    return RunConfig(**{"epochs": 30 if given.get("dataset", "digits") == "digits" else 5} | recipe | given)


def parse_alpha(given: float | str | Sequence[float]) -> float | tuple[float, ...] | str:
    """A number; "0.9,0.5,0.3", one a stage; "0.9:0.3", linear over depth (stays a text until the depth is known)."""
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
    """One alpha for each of `depth` stages. Raises ValueError for another number of them."""
    alpha = parse_alpha(alpha)
    if isinstance(alpha, tuple) and len(alpha) != depth:
        raise ValueError(f"alpha must be one number or one for each of the {depth} stages, not {len(alpha)}")
    if isinstance(alpha, str):
        first, last = map(float, alpha.split(":"))
        return torch.linspace(first, last, depth, dtype=torch.float64).tolist()
    return [alpha] * depth if isinstance(alpha, float | int) else list(alpha)


def is_plain(run: RunConfig) -> bool:
    """Whether its network is the backbone with one classifier."""
    return run.layout == "stagewise" and run.method in BACKPROPAGATED


def stage_alphas(run: RunConfig) -> list[float]:
    """One for each stage of a run's network. Raises ValueError for a depth, or a number of alphas, it cannot have."""
    depth = stage_count(run.arch, run.layout, run.depth)
    if run.method == "sid":
        return alpha_by_depth(run.alpha, depth)
    return [1.0] * (1 if is_plain(run) else depth)  # a cross-entropy alone


def make_data(run: RunConfig) -> ImageData:
    data = load_data(
        run.dataset,
        run.data,
        cache=run.cache,
        download=run.download,
        image_size=run.image_size,
        stream=run.stream,
        workers=run.workers,
    )
    if run.train_images is not None:
        data = with_subset(data, run.train_images)
    if run.val:
        data = with_validation(data, run.val)
    if run.label_noise:
        data = with_label_noise(data, run.label_noise, run.seed)
    crop = data.crop if run.crop is None else run.crop
    return data._replace(crop=crop, flip=data.flip if run.flip is None else run.flip)


def make_network(run: RunConfig, classes: int, in_channels: int, image_size: tuple[int, int]) -> SIDNetwork:
    return build_network(
        run.arch, run.layout, num_classes=classes, in_channels=in_channels, image_size=image_size, depth=run.depth,
        plain=is_plain(run), head_depth=run.head_depth, hidden_dim=run.hidden_dim, grid=run.grid,
    )  # fmt: skip


def make_trainer(run: RunConfig, folder: Path | str | None = None, *, quiet: bool = False) -> Trainer:
    """The trainer of a run that has not begun; the seed draws its network. Of many processes each makes its own, all at
    the same time."""
    alphas = stage_alphas(run)
    place = meet(run)
    with said_once(place) if place else contextlib.nullcontext():
        data = make_data(run)
        torch.manual_seed(run.seed)
        network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    own = {field.name: getattr(run, field.name) for field in dataclasses.fields(TrainConfig)}
    own["alpha"] = alphas
    if run.method != "sid":  # what is said of their stages is said by their loss, too
        own["divergence"] = "forward"
    about = dataclasses.asdict(run) | {
        "crop": data.crop, "flip": data.flip, "depth": len(alphas), "run": dataclasses.asdict(run),
    }  # fmt: skip
    if place is None:
        return Trainer(network, data, TrainConfig(**own), folder, about=about, quiet=quiet)
    from .parallel import ParallelTrainer

    own["device"] = own_device(run.device)
    parts = stages_of_ranks(run, network, place, data) if run.parallel == "stage" else None
    return ParallelTrainer(
        network, data, TrainConfig(**own), folder, place=place, parts=parts, in_flight=run.in_flight, stale=run.stale,
        about=about, quiet=quiet,
    )  # fmt: skip


def meet(run: RunConfig) -> Place | None:
    if run.parallel == "none":
        if world_size() > 1:
            raise ValueError(f"parallel must say how {world_size()} processes share the work: data or stage, not none")
        return None
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in MOVABLE}
    settings |= {name: getattr(run, name) for name in PROCESSES}
    return join(run.parallel, settings, replicas=run.replicas, timeout=run.timeout, device=run.device)


def stages_of_ranks(run: RunConfig, network: SIDNetwork, place: Place, data: ImageData) -> list[range]:
    """Consecutive stages for each rank of the pipeline, balanced by what they cost on the first one's machine."""
    depth = len(network.stages)
    if depth < place.stages:
        refuse(place, f"{place.stages} ranks cannot share {depth} stages: start at most {depth} for each replica")
    counts = run.stages_per_rank
    if counts is None:
        seconds = None
        if run.layout == "shared":  # the extractor is most of the first rank's work
            seconds = [float(depth), *[1.0] * (depth - 1)]
        elif place.rank == 0 and place.stages > 1:
            shape = run.batch_size // place.replicas, *data.image_size, data.in_channels
            inputs = torch.zeros(shape).permute(0, 3, 1, 2)
            labels = torch.zeros(len(inputs), dtype=torch.int64)
            costs = measure_stages(network, inputs, labels, optimizer=run.optimizer, dtype=DTYPES[run.dtype], rounds=3)
            seconds = [cost.seconds for cost in costs]
        counts = [len(part) for part in balanced(tell_all(place, seconds) or [1.0] * depth, place.stages)]
    if len(counts) != place.stages or sum(counts) != depth or min(counts) < 1:
        refuse(place, f"stages_per_rank must be {place.stages} positive numbers whose sum is {depth}, not {counts}")
    edges = [0, *accumulate(counts)]
    return [range(a, b) for a, b in pairwise(edges)]


def saved_run(place: Path) -> tuple[RunConfig, dict]:
    """The settings of a run that was saved, and its checkpoint's state. Raises ValueError in one line."""
    state = load_checkpoint(place)
    try:
        return RunConfig(**state["config"]["run"]), state
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: was not saved by `sid train` of this version ({error})") from error


def resumed(place: Path, *, quiet: bool = False, **moved) -> Trainer:
    """The trainer of a run as its checkpoint has it; `moved`: settings that say where things are now, and how many
    processes go on with it (one, unless said)."""
    run, _ = saved_run(place)
    alone = {name: getattr(RunConfig, name) for name in PROCESSES}
    moved = alone | {name: value for name, value in moved.items() if value is not None}
    trainer = make_trainer(dataclasses.replace(run, **moved), place if place.is_dir() else place.parent, quiet=quiet)
    trainer.resume(place)
    return trainer


def trained_network(place: Path) -> tuple[SIDNetwork, RunConfig, dict]:
    """The network of a checkpoint, on the CPU, in evaluation mode; its settings; what config.json says."""
    run, state = saved_run(place)
    about = state["config"]
    network = make_network(run, len(about["classes"]), about["in_channels"], tuple(about["image_size"]))
    network.load_state_dict(state["network"])
    return network.eval(), run, about


def evaluated(place: Path, **moved) -> dict:
    """What every stage of a saved network knows of its test split, and how many images that is."""
    network, run, about = trained_network(place)
    run = dataclasses.replace(run, **{name: value for name, value in moved.items() if value is not None})
    data, dtype = make_data(run), DTYPES[run.dtype]
    own = {"classes": data.classes, "in_channels": data.in_channels, "image_size": list(data.image_size)}
    check_same(place, about, own, own)
    mean, std = torch.tensor(about["pixel_mean"]), torch.tensor(about["pixel_std"])
    batches = Batches(data.test, run.batch_size, torch.device("cpu"), mean, std, workers=run.workers)
    options = {"divergence": about["divergence"], "label_smoothing": run.label_smoothing, "dtype": dtype}
    return evaluate(network, batches.in_order(), about["alpha"], **options) | {"images": len(data.test.labels)}
