"""Build the data, the network and the trainer of a run from its settings, or load a run from its folder."""

import copy
import json
import math
from dataclasses import asdict, fields, replace
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Batches
from ..data.datasets import ImageData, default_cache, load_data
from ..data.own import OwnData
from ..data.splits import add_label_noise, split_validation, take_subset
from ..data.text import TextData, load_text
from ..distributed import rendezvous
from ..distributed.balance import balance_stages, measure_stage_seconds
from ..distributed.rendezvous import Communicator
from ..distributed.strategy import DataStrategy, ShardStrategy, StageStrategy
from ..distributed.topology import Topology
from ..files import CONFIG, PICTURE, PIPELINE
from ..methods.common import StepOptions
from ..methods.factory import LOCAL
from ..network.architectures import build_network, stage_count
from ..network.heads import StackedHeads
from ..network.language import LanguageModel, build_language_model
from ..network.modules import SIDNetwork
from ..network.own import Network, make_own_network
from ..training.checkpoint import LAST, PREVIOUS, check_same, has_checkpoint, load_checkpoint
from ..training.config import DTYPES, MOVABLE, PROCESSES, RunConfig, TrainConfig, is_plain, stage_alphas
from ..training.evaluation import accuracy, evaluate, exit_curve
from ..training.operations import exit_operations, training_operations
from ..training.strategy import Strategy, pick_device
from ..training.trainer import Trainer


def make_data(run: RunConfig) -> Any:
    """Load the data of a run: a text, or images with subset, validation split, label noise and augmentation."""
    if run.dataset == "text":
        cache = default_cache() if run.cache is None else run.cache
        return load_text(run.data, run.tokens, run.context, run.vocabulary, cache=cache)
    data = load_data(
        run.dataset, run.data, cache=run.cache, download=run.download, image_size=run.image_size, stream=run.stream,
        workers=run.workers,
    )  # fmt: skip
    if run.train_images is not None:
        data = take_subset(data, run.train_images)
    if run.val:
        data = split_validation(data, run.val)
    if run.label_noise:
        data = add_label_noise(data, run.label_noise, run.seed)
    crop = data.crop if run.crop is None else run.crop
    return data._replace(crop=crop, flip=data.flip if run.flip is None else run.flip)


def make_network(run: RunConfig, classes: int, in_channels: int, image_size: tuple[int, int]) -> Network:
    """Build the network of a run, with newly drawn parameters."""
    if run.network is not None:
        return make_own_network(run.network, classes, in_channels, image_size)
    if run.arch == "gpt":
        return build_language_model(
            classes, run.context, stage_count(run.arch, run.layout, run.depth), layers=run.layers, width=run.width,
            attention_heads=run.attention_heads, plain=is_plain(run), readout=run.readout, readout_blocks=run.tail,
            readout_refresh=run.readout_refresh,
        )  # fmt: skip
    return build_network(
        run.arch, run.layout, num_classes=classes, in_channels=in_channels, image_size=image_size, depth=run.depth,
        plain=is_plain(run), head_depth=run.head_depth, hidden_dim=run.hidden_dim, grid=run.grid,
        fused=run.fused and run.method in LOCAL and run.schedule == "one-pass", norm=run.norm, tail=run.tail,
        prior_input=run.prior_input, prior_dropout=run.prior_dropout, classifier=run.classifier,
    )  # fmt: skip


def make_config(run: RunConfig) -> TrainConfig:
    """Return the settings of this process's trainer for a run."""
    settings = {setting.name: getattr(run, setting.name) for setting in fields(TrainConfig)}
    device = run.device if run.parallel == "none" else rendezvous.local_device(run.device)
    return TrainConfig(**settings | {"device": device})


# ---------------------------------------------------------------- the trainer


def make_trainer(
    run: RunConfig, folder: Path | None = None, *, quiet: bool = False, communicator: Communicator | None = None
) -> Trainer:
    """Build the trainer of a new run; the seed determines the initial parameters of its network.

    Under torchrun every process must call this at the same time. Raises ValueError for settings that do not fit.
    """
    communicator = communicator or connect(run)
    if run.parallel != "none" and run.layout == "shared" and run.head_depth == 1:
        run = replace(run, fused=False)  # replicas reduce the gradients of one stage at a time
    with communicator.raise_on_one_rank():
        if run.network is None:
            stage_alphas(run)  # raises ValueError before the data are read
        data = make_data(run)
        torch.manual_seed(run.seed)
        network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    metadata = asdict(run) | {"crop": data.crop, "flip": data.flip, "depth": network.depth}
    if run.network is not None:
        metadata |= {"arch": run.network, "layout": "own"}
    metadata |= {"run": asdict(run), "launch": rendezvous.launch_id()}
    if isinstance(data, TextData):
        metadata |= {"bytes_per_token": data.bytes_per_token, "tokenizer": data.tokenizer}
    elif isinstance(network, SIDNetwork) and communicator.is_logging:  # the rank that writes and prints them
        shape = (data.in_channels, *data.image_size)
        costs = training_operations(network, run.method, shape), exit_operations(network, shape)[-1]
        metadata["operations"] = dict(zip(("training", "inference"), costs, strict=True))
    communicator.has_checkpoint = lambda: folder is not None and has_checkpoint(folder)
    with communicator.watch():
        strategy = make_strategy(run, network, data, communicator)
        return Trainer(network, data, make_config(run), folder, strategy=strategy, metadata=metadata, quiet=quiet)


def connect(run: RunConfig, problem: str = "") -> Communicator:
    """Connect to the processes that share a run. A nonempty `problem`, an error of this rank, ends all of them."""
    if run.parallel == "none":
        if (size := rendezvous.torchrun_number("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"parallel must be data, shard or stage for {size} processes, not none")
        return Communicator(Topology())
    device = run.device
    try:
        pick_device(rendezvous.local_device(device))
    except ValueError as error:  # perhaps on this rank only
        problem, device = problem or str(error), "cpu"
    settings = {name: value for name, value in asdict(run).items() if name not in MOVABLE}
    settings |= {name: getattr(run, name) for name in PROCESSES}
    return rendezvous.init_distributed(
        run.parallel, settings, problem=problem, replicas=run.replicas, timeout=run.timeout, device=device
    )


def make_strategy(run: RunConfig, network: Network, data: ImageData, communicator: Communicator) -> Strategy:
    """Return the strategy with which this process takes part in a run."""
    if run.parallel == "none":
        return Strategy()
    assert isinstance(network, SIDNetwork)  # your own network is for one process
    if run.parallel == "stage":
        return StageStrategy(communicator, assign_stages(run, network, data, communicator), run.in_flight)
    shards = run.parallel == "shard" and communicator.topology.replicas > 1
    return ShardStrategy(communicator) if shards else DataStrategy(communicator)


def assign_stages(run: RunConfig, network: SIDNetwork, data: ImageData, communicator: Communicator) -> list[range]:
    """Return the stages of each rank of a pipeline: those in the settings, or balanced by their cost on rank 0."""
    topology, depth, counts = communicator.topology, len(network.stages), run.stages_per_rank
    if depth < (ranks := topology.stage_ranks):
        communicator.abort_all(f"{ranks} ranks cannot share {depth} stages: start at most {depth} for each replica")
    if counts is None:
        with communicator.raise_on_one_rank():
            is_measuring = topology.rank == 0 and ranks > 1
            seconds = stage_seconds(run, network, data, topology.replicas) if is_measuring else [1.0] * depth
        return balance_stages(communicator.gather(seconds)[0], ranks)
    if len(counts) != ranks or sum(counts) != depth or min(counts) < 1:
        communicator.abort_all(f"stages_per_rank must be {ranks} positive numbers whose sum is {depth}, not {counts}")
    return [range(start, end) for start, end in pairwise([0, *accumulate(counts)])]


def stage_seconds(run: RunConfig, network: SIDNetwork, data: ImageData, replicas: int) -> list[float]:
    """Measure the seconds per batch of each stage on this process's device."""
    strategy = Strategy()
    config = replace(make_config(run), batch_size=-(-run.batch_size // replicas))
    network = copy.deepcopy(network)
    strategy.setup(network, data, config)
    batches = chain.from_iterable(strategy.train_batches(epoch, 0) for epoch in count())
    return measure_stage_seconds(network, batches, strategy.options, run.optimizer)


# ---------------------------------------------------------------- runs in folders


def start_run(run: RunConfig, folder: Path, *, overwrite: bool = False) -> Trainer:
    """Build the trainer of a new run, or resume the run if torchrun restarted its processes.

    Raises ValueError if the folder holds another run and `overwrite` is False.
    """
    communicator, launch = connect(run), rendezvous.launch_id()
    with communicator.raise_on_one_rank():
        if launch is None and rendezvous.torchrun_number("TORCHELASTIC_MAX_RESTARTS"):  # which run would it resume?
            raise ValueError("torchrun --max-restarts needs --standalone or an --rdzv-id to find the run again")
    restarts = communicator.gather(rendezvous.torchrun_number("TORCHELASTIC_RESTART_COUNT"))
    restarted = any(restarts)  # a machine that joined later counts from 0
    resumes = restarted and launch is not None and recorded_launch(folder) == launch
    saved = communicator.gather(resumes and has_checkpoint(folder))
    with communicator.raise_on_one_rank():
        if any(saved) and not saved[communicator.topology.rank]:
            raise ValueError(
                f"{folder}: holds no checkpoint here, but on rank {saved.index(True)}: all ranks need the same folder"
            )
        if (folder / CONFIG).exists() and not (overwrite or resumes):
            raise ValueError(f"{folder}: holds a run already; choose another --out, --resume it, or give --overwrite")
    trainer = make_trainer(run, folder, communicator=communicator)
    if any(saved):
        trainer.resume()
    elif trainer.strategy.writes_run_folder:
        for path in (*(folder / name for name in (LAST, PREVIOUS, PICTURE, PIPELINE)), *folder.glob("events.out.tf*")):
            path.unlink(missing_ok=True)
    return trainer


def recorded_launch(folder: Path) -> str | None:
    """Return the id of the torchrun launch that last trained the run in a folder, or None."""
    try:
        return json.loads((folder / CONFIG).read_text())["launch"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def load_saved_run(path: Path) -> tuple[RunConfig, dict]:
    """Return the settings and the checkpoint of a saved run. Raises ValueError if it is missing or damaged."""
    state = load_checkpoint(path)
    try:
        return RunConfig(**state["config"]["run"]), state
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: was not saved by `sid train` of this version ({error})") from error


def resume_run(path: Path, *, quiet: bool = False, **moved: Any) -> Trainer:
    """Build the trainer of a saved run. `moved` replaces settings in MOVABLE; by default one process trains."""
    alone = {name: getattr(RunConfig, name) for name in PROCESSES}
    moved = alone | {name: value for name, value in moved.items() if value is not None}
    if moved["parallel"] != "none":
        moved = {"download": False} | moved  # it was downloaded when the run started
    try:
        run = replace(load_saved_run(path)[0], **moved)
    except ValueError as error:  # end the other ranks, which may have found the run
        processes = {name: moved[name] for name in PROCESSES}
        connect(RunConfig(**processes, layout="stagewise", device="cpu"), problem=str(error))
        raise
    trainer = make_trainer(run, path if path.is_dir() else path.parent, quiet=quiet)
    trainer.resume(path)
    return trainer


def load_network(path: Path) -> tuple[Network, RunConfig, dict]:
    """Load a saved network on the CPU in evaluation mode; return it, its settings, and the content of config.json."""
    run, state = load_saved_run(path)
    metadata = state["config"]
    network = make_network(run, len(metadata["classes"]), metadata["in_channels"], tuple(metadata["image_size"]))
    network.load_state_dict(state["network"])
    return network.eval(), run, metadata


CONFIDENCES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)  # at which images may leave the cascade


def evaluate_run(path: Path, *, exits: bool = False, **moved: Any) -> dict:
    """Measure a saved network on its test images; return the metrics of `evaluate` and the number of `images`.

    A network of separate stages also has the accuracies of `plain` inference, by the trunk and the last head alone, and
    of the `averaged` beliefs. `exits` adds what `measure_exits` returns. `moved` replaces settings, such as `data`.
    Raises ValueError if the images there have other classes or another size.
    """
    network, run, metadata = load_network(path)
    run = replace(run, **{name: value for name, value in moved.items() if value is not None})
    data = make_data(run)
    properties = {"classes": data.classes, "in_channels": data.in_channels, "image_size": list(data.image_size)}
    check_same(path, metadata, properties, properties)
    device = torch.device("cpu")
    if isinstance(data, OwnData):
        batches = data.make_batches(data.test, run.batch_size, device, False)
    else:
        mean, std = torch.tensor(metadata["pixel_mean"]), torch.tensor(metadata["pixel_std"])
        batches = Batches(data.test, run.batch_size, device, mean, std, workers=run.workers)
    options = StepOptions(metadata["alpha"], metadata["divergence"], metadata["label_smoothing"], DTYPES[run.dtype])
    metrics: dict[str, Any] = {**evaluate(network, batches.in_order(), options), data.unit: batches.count}
    if isinstance(data, TextData):  # its readouts read no prior, so plain inference is the last stage itself
        metrics["bytes_per_token"] = data.bytes_per_token
    elif isinstance(network, SIDNetwork) and not isinstance(network.stages, StackedHeads) and network.depth > 1:
        metrics["plain"] = accuracy(network.plain(), batches.in_order(), options)
        metrics["averaged"] = accuracy(network.averaged, batches.in_order(), options)
    if exits:
        metrics |= measure_exits(network, batches, options, (data.in_channels, *data.image_size))
    return metrics


def measure_exits(network: Network, batches: Batches, options: StepOptions, shape: tuple[int, ...]) -> dict:
    """Measure the accuracy and the operations of a network if images leave it at the first stage that is sure.

    "exits" has a dict for each of CONFIDENCES, and one for "all" stages: confidence, accuracy, share of images that
    leave at each stage, and operations per image. "plain_operations" are those of the trunk and the last head.

    Raises ValueError for a network without several stages.
    """
    if not isinstance(network, SIDNetwork) or isinstance(network, LanguageModel) or network.depth < 2:
        raise ValueError("exit needs a network of several stages on images that is not cut by names")
    operations = exit_operations(network, shape)
    curve = exit_curve(network, batches.in_order(), options, [*CONFIDENCES, math.inf])
    rows = [
        {"confidence": name, "accuracy": exit_accuracy, "stages": shares,
         "operations": sum(share * cost for share, cost in zip(shares, operations, strict=True))}
        for name, (exit_accuracy, shares) in zip([*CONFIDENCES, "all"], curve, strict=True)
    ]  # fmt: skip
    plain = operations[-1] if isinstance(network.stages, StackedHeads) else exit_operations(network.plain(), shape)[-1]
    return {"exits": rows, "plain_operations": plain}
