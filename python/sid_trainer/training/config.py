"""The settings of a run: `TrainConfig` holds those of training, `RunConfig` adds network, data and processes.

Each setting is declared once, with its default, help text and limits; `options.py` turns it into a flag of `sid`.
Values are checked before any data are read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from sid_kernels.core.options import DIVERGENCES

from ..data.datasets import DATASETS
from ..data.text import TOKENS
from ..methods.common import STEP_SCHEDULES
from ..methods.factory import BACKPROPAGATED, CROSS_ENTROPY, LOCAL, LR_SCHEDULES, METHODS, OPTIMIZERS
from ..network.architectures import ARCHITECTURES, CLASSIFIERS, LAYOUTS, stage_count
from ..network.language import READOUTS

PARALLEL = ("none", "data", "shard", "stage")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Limit = tuple[str, Callable[[Any], bool]]  # the allowed values: a description and a test
SHARE: Limit = ("in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_1: Limit = ("in [0, 1)", lambda value: 0 <= value < 1)
POSITIVE: Limit = ("a positive number", lambda value: 0 < value < math.inf)


def at_least(lowest: float) -> Limit:
    """Return the limit "finite and at least `lowest`"."""
    return f"at least {lowest}", lambda value: lowest <= value < math.inf


def setting(group: str, default: Any, help: str, limit: Limit | None = None, **flag: Any) -> Any:
    """Declare a setting as a field of a dataclass.

    Args:
        group: The heading of its flag in the help of `sid`.
        help: The help text of its flag; the default is appended unless the text contains "(default".
        limit: The allowed values; None is always allowed.
        flag: More arguments for `add_argument`. `choices` also limit the values of the field.
    """
    return field(default=default, metadata={"group": group, "help": help, "limit": limit, "flag": flag})


GROUPS = ("training", "data", "network", "language model", "local loss", "machine", "processes, started by torchrun")
training, images, network, language, loss, machine, processes = (partial(setting, group) for group in GROUPS)
BY_RECIPE = "(default: the network's recipe)"


@dataclass(frozen=True)
class TrainConfig:
    """The settings of training, for any network and data. Raises ValueError for a value that is not allowed.

    `sid train --help` describes every setting under the flag of the same name. alpha is a number in [0, 1], one number
    per stage (a sequence or the text "0.9,0.5,..."), or the text "FIRST:LAST", which interpolates linearly over depth.
    label_smoothing may also be "graded".
    Methods other than "sid" train with cross-entropy and ignore alpha and divergence.
    """

    method: str = training("sid", "how gradients are computed", choices=METHODS)
    schedule: str = loss("one-pass", "order of forward passes and updates in a SID step", choices=STEP_SCHEDULES)
    fused: bool = loss(True, "train equal stages in one kernel; otherwise hold activations of one stage at a time")
    epochs: int = training(5, "passes over the training images (default: 30 for digits, otherwise 5)", at_least(1))
    batch_size: int = training(128, "images per step", at_least(1))
    optimizer: str = training("adam", f"optimizer {BY_RECIPE}", choices=tuple(OPTIMIZERS))
    lr: float = training(1e-3, f"highest learning rate {BY_RECIPE}", POSITIVE)
    weight_decay: float = training(0.0, f"weight decay {BY_RECIPE}", at_least(0))
    lr_schedule: str = training("constant", f"learning rate over the steps {BY_RECIPE}", choices=LR_SCHEDULES)
    alpha: float | str | Sequence[float] = loss(0.5, "weight of fidelity: A, FIRST:LAST, or A,B,... with one per stage")
    divergence: str = loss("forward", "direction of the KL divergence to the teacher", choices=DIVERGENCES)
    label_smoothing: float | str | Sequence[float] = loss(
        0.0, "share of each label's mass spread over all classes: X, FIRST:LAST, X,Y,..., or graded for 1/2,1/4,...",
        SHARE_BELOW_1,
    )  # fmt: skip
    seed: int = training(0, "seed of initial parameters, order, crops, flips and label noise", at_least(0))
    dtype: str = machine("float32", "dtype of forward passes; bfloat16 uses autocast", choices=tuple(DTYPES))
    device: str = machine("auto", "cpu, cuda, cuda:N, or auto for a GPU if there is one")
    channels_last: bool = machine(True, "memory format of images and features")
    streams: bool = machine(True, "on a GPU, run each stage on a CUDA stream of its own")
    graph: bool = machine(False, "on a GPU, run the step as one CUDA graph")
    workers: int = images(2, "processes that decode streamed images", at_least(0))
    save_every: int = machine(0, "also save after this many steps (default: after each epoch only)", at_least(0))

    def __post_init__(self) -> None:
        for name in ("alpha", "label_smoothing"):
            object.__setattr__(self, name, parse_by_depth(name, getattr(self, name)))
        for declared in fields(self):
            name, value, limit = declared.name, getattr(self, declared.name), declared.metadata["limit"]
            choices = declared.metadata["flag"].get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
            numbers = value if isinstance(value, tuple) else () if isinstance(value, str) else (value,)
            if limit and value is not None and not all(map(limit[1], numbers)):
                raise ValueError(f"{name} must be {limit[0]}, not {value}")
            if value == "":
                raise ValueError(f"{name} must not be empty")
        if self.divergence == "reverse" and not min(by_depth("label_smoothing", self.label_smoothing)):
            raise ValueError("divergence 'reverse' needs label_smoothing above 0: labels must have full support")
        for name, value in CROSS_ENTROPY.items() if self.method != "sid" else ():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """The settings of a run: those of `TrainConfig`, and of data, network and processes. Raises ValueError."""

    dataset: str = images("digits", "data set (default: what --data holds, or digits)", choices=(*DATASETS, "text"))
    data: str | None = images(None, "folder of the data set, one with train/CLASS/... and test/CLASS/..., or a text")
    cache: str | None = images(None, "folder for decoded images and tokens (default: in the user's cache folder)")
    download: bool = images(False, "download the data set into --data")
    image_size: int | None = images(None, "resize and crop image files to this many pixels (default: as they are)")
    stream: bool | None = images(None, "decode images batch by batch (default: if they would fill half the memory)")
    train_images: int | None = images(None, "size of a fixed class-balanced subset (default: all)", at_least(1))
    val: float = images(0.0, "share of the training images to hold out for validation", SHARE_BELOW_1)
    label_noise: float = images(0.0, "share of the training labels to replace by wrong ones", SHARE)
    crop: int | None = images(None, "pixels to pad by before random crops (default: by data set)", at_least(0))
    flip: bool | None = images(None, "flip images horizontally at random (default: by data set)")
    arch: str = network("simple_cnn", "backbone", choices=ARCHITECTURES)
    layout: str = network("shared", "one trunk for all stages, or the trunk cut into stages", choices=LAYOUTS)
    depth: int | None = network(None, "number of stages (default: 10 if shared, otherwise the backbone's own)")
    head_depth: int = network(1, "hidden layers of each stage head")
    hidden_dim: int = network(256, "size of these hidden layers")
    grid: int = network(4, "stagewise heads read features pooled to N x N cells")
    norm: bool = network(False, "batch-norm in simple_cnn and mlp, and in the hidden layers of stagewise heads")
    tail: int = network(0, "additional blocks in each stagewise head, before pooling", at_least(0))
    prior_input: bool = network(True, "stagewise heads take the prior as input; otherwise only their loss uses it")
    prior_dropout: float = network(0.0, "share of images whose prior a head replaces by the uniform belief", SHARE)
    classifier: str = network("linear", "classifier of a plain network trained by backpropagation", choices=CLASSIFIERS)
    tokens: str = language("bytes", f"what a text is divided into: {', '.join(TOKENS)}, or a tokenizer file (.json)")
    vocabulary: int = language(4096, "number of tokens of --tokens bpe", at_least(257))
    context: int = language(128, "tokens that a prediction can read", at_least(1))
    layers: int = language(6, "blocks of the decoder", at_least(1))
    width: int = language(192, "size of its features", at_least(1))
    attention_heads: int = language(6, "attention heads of each block", at_least(1))
    readout: str = language("private", "a readout for each stage, or a copy of the last one's", choices=READOUTS)
    readout_refresh: int = language(1, "steps after which shared readouts are copied again", at_least(1))
    network: str | None = network(None, "MODULE:FUNCTION that returns your own network (instead of --arch)")
    parallel: str = processes("none", "share batches, also parameters, or stages among processes", choices=PARALLEL)
    replicas: int = processes(1, "number of pipelines that share each batch", at_least(1))
    stages_per_rank: Sequence[int] | None = processes(None, "stages of each rank (default: by their cost)", nargs="+")
    in_flight: int = processes(2, "batches in flight between two ranks", at_least(1))
    timeout: float = processes(600.0, "seconds of silence after which a rank counts as lost", at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages_per_rank is not None:
            object.__setattr__(self, "stages_per_rank", tuple(self.stages_per_rank))
        check_parallel(self)
        if self.network is not None and self.parallel != "none":
            raise ValueError(f"network is for one process, not for parallel {self.parallel!r}")
        check_text(self)
        if self.flip and self.dataset in ("digits", "mnist"):
            raise ValueError(f"flip makes no sense for {self.dataset}: a mirrored digit is not that digit")
        if self.data is not None and self.dataset == "digits":
            raise ValueError("data must not be given for digits, which are part of scikit-learn")


# Settings of images and their networks, which a text and a language model do not have.
IMAGE_SETTINGS = (
    "download", "image_size", "stream", "train_images", "val", "label_noise", "crop", "flip", "head_depth",
    "hidden_dim", "grid", "norm", "prior_input", "prior_dropout", "classifier", "network",
)  # fmt: skip


def check_text(run: RunConfig) -> None:
    """Raise ValueError for settings of images with a text, and for settings of a text with images."""
    if (run.dataset == "text") != (run.arch == "gpt"):
        raise ValueError(f"arch must be gpt for dataset text, and for no other, not {run.arch!r} for {run.dataset!r}")
    text = run.arch == "gpt"
    for declared in fields(run):
        name, group = declared.name, declared.metadata["group"]
        if (name in IMAGE_SETTINGS if text else group == GROUPS[3]) and getattr(run, name) != declared.default:
            raise ValueError(f"{name} must be left out for {'text' if text else 'images'}, not {getattr(run, name)!r}")
    if run.graph and run.readout_refresh > 1:
        raise ValueError(f"readout_refresh must be 1 with graph, which repeats one step, not {run.readout_refresh}")
    if text and run.parallel == "shard":
        raise ValueError("parallel must be none, data or stage for dataset text, not 'shard'")


def check_parallel(run: RunConfig) -> None:
    """Raise ValueError for settings that do not fit `parallel`."""
    parallel = f"parallel {run.parallel!r}"
    for name in ("download", "graph"):
        if run.parallel != "none" and getattr(run, name):
            raise ValueError(f"{name} is for one process, not for {parallel}")
    if run.parallel in ("data", "shard") and run.method == "bp-checkpoint":
        raise ValueError(f"method 'bp-checkpoint' cannot recompute with {parallel}")
    if run.parallel != "stage":
        if run.replicas > 1 or run.stages_per_rank is not None:
            raise ValueError(f"replicas and stages_per_rank are for parallel 'stage', not for {run.parallel!r}")
    elif run.method not in LOCAL or run.schedule != "one-pass":
        allowed = f"method {' or '.join(LOCAL)} and schedule one-pass"
        raise ValueError(f"{parallel} needs {allowed}, not {run.method!r}, {run.schedule!r}")
    elif run.layout == "shared":
        raise ValueError(f"{parallel} needs layout 'stagewise', not 'shared'; a shared network takes parallel 'data'")


# Settings that may change when a run is resumed: paths of files, and the processes that train it.
PROCESSES = tuple(declared.name for declared in fields(RunConfig) if declared.metadata["group"] == GROUPS[-1])
MOVABLE = ("data", "cache", "download", "device", "workers", "save_every", *PROCESSES)

# Strong recipes for backpropagation; every method compared with it uses the same ones.
RECIPES: dict[str, dict[str, Any]] = {
    "simple_cnn": {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 5e-4},
    "vgg11": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "resnet18": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "vit_tiny": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
    "mlp": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 5e-4},
    "gpt": {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.1, "layout": "stagewise", "batch_size": 32},
}


def run_config(**given: Any) -> RunConfig:
    """Return the settings of a run; those missing or None come from the network's recipe, then from the defaults."""
    given = {name: value for name, value in given.items() if value is not None}
    unused = [f.name for f in fields(RunConfig) if f.metadata["group"] == "network" and f.name in given]
    if "network" in given and unused != ["network"]:
        raise ValueError(f"{unused[0]} is for the networks of --arch, not for network {given['network']!r}")
    if given.get("dataset") == "text":
        given = {"arch": "gpt"} | given
    common = {"epochs": 30 if given.get("dataset", "digits") == "digits" else 5, "lr_schedule": "one-cycle"}
    return RunConfig(**common | RECIPES.get(given.get("arch", RunConfig.arch), {}) | given)


GRADED = "graded"  # label smoothing 1/2, 1/4, 1/8, ... over depth: the beliefs of an ideal cascade with alpha 1/2


def parse_by_depth(name: str, value: float | str | Sequence[float]) -> float | str | tuple[float, ...]:
    """Return a setting in [0, 1] as a number, as one number per stage, or as text "FIRST:LAST". Raises ValueError.

    The label smoothing may also be the text "graded".
    """
    graded = name == "label_smoothing"
    if graded and value == GRADED:
        return GRADED
    linear = ":" in str(value)
    parts = value.replace(":", ",").split(",") if isinstance(value, str) else value
    try:
        numbers = tuple(map(float, parts)) if isinstance(parts, Sequence) else (float(parts),)
    except ValueError:
        numbers = ()
    if not numbers or (linear and len(numbers) != 2) or not all(0 <= number <= 1 for number in numbers):
        allowed = f"a number in [0, 1], FIRST:LAST, {'graded, ' * graded}or one number per stage (0.9,0.5,...)"
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return str(value) if linear else numbers[0] if len(numbers) == 1 else numbers


def by_depth(name: str, value: float | str | Sequence[float], depth: int | None = None) -> list[float]:
    """Return one number for each of `depth` stages (None: as many as given). Raises ValueError for another number."""
    value = parse_by_depth(name, value)
    if value == GRADED:
        if depth == 1:
            raise ValueError(f"{name} must be a number for one stage, not {GRADED!r}")
        return [0.5**i for i in range(1, (depth or 2) + 1)]
    if isinstance(value, str):
        first, last = map(float, value.split(":"))
        return torch.linspace(first, last, depth or 2, dtype=torch.float64).tolist()
    numbers = [value] * (depth or 1) if isinstance(value, float) else list(value)
    if len(numbers) != (depth or len(numbers)):
        raise ValueError(f"{name} must be one number or one for each of the {depth} stages, not {len(numbers)}")
    return numbers


def is_plain(run: RunConfig) -> bool:
    """Return whether the run trains a plain backbone with a single classifier."""
    return run.network is None and run.layout == "stagewise" and run.method in BACKPROPAGATED


def stage_alphas(run: RunConfig) -> list[float]:
    """Return alpha for each stage of a run. Raises ValueError if depth, alpha or label smoothing does not fit."""
    depth = stage_count(run.arch, run.layout, run.depth)
    depth = 1 if is_plain(run) else depth
    by_depth("label_smoothing", run.label_smoothing, depth)
    return by_depth("alpha", run.alpha, depth)
