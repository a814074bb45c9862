"""Build what a command or a checkpoint asks for: the data, the network, the trainer and the processes of a run."""

import copy
import dataclasses
import json
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Batches, pixel_statistics
from ..data.datasets import ImageData, load_data
from ..data.splits import with_label_noise, with_subset, with_validation
from ..distributed.balance import balance_stages, measure_stage_seconds
from ..distributed.rendezvous import (
    Communicator,
    init_distributed,
    launch_id,
    local_device,
    max_restarts,
    restart_count,
    world_size,
)
from ..distributed.strategy import DataStrategy, ShardStrategy, StageStrategy
from ..distributed.topology import Topology
from ..files import CONFIG, PICTURE, PIPELINE
from ..methods.common import StepOptions
from ..methods.factory import LOCAL
from ..network.architectures import build_network
from ..network.modules import SIDNetwork
from ..training.checkpoint import LAST, PREVIOUS, check_same, has_checkpoint, load_checkpoint
from ..training.config import DTYPES, MOVABLE, PROCESSES, RunConfig, TrainConfig, is_plain, stage_alphas
from ..training.evaluation import evaluate
from ..training.strategy import Strategy, pick_device
from ..training.trainer import Trainer


def make_data(run: RunConfig) -> ImageData:
    """Load the data of a run, with its subset, validation split, label noise and augmentation."""
    data = load_data(
        run.dataset, run.data, cache=run.cache, download=run.download, image_size=run.image_size, stream=run.stream,
        workers=run.workers,
    )  # fmt: skip
    if run.train_images is not None:
        data = with_subset(data, run.train_images)
    if run.val:
        data = with_validation(data, run.val)
    if run.label_noise:
        data = with_label_noise(data, run.label_noise, run.seed)
    crop = data.crop if run.crop is None else run.crop
    return data._replace(crop=crop, flip=data.flip if run.flip is None else run.flip)


def make_network(run: RunConfig, classes: int, in_channels: int, image_size: tuple[int, int]) -> SIDNetwork:
    """Build the network of a run with freshly drawn parameters."""
    return build_network(
        run.arch, run.layout, num_classes=classes, in_channels=in_channels, image_size=image_size, depth=run.depth,
        plain=is_plain(run), head_depth=run.head_depth, hidden_dim=run.hidden_dim, grid=run.grid,
        fused=run.fused and run.method in LOCAL and run.schedule == "one-pass",
    )  # fmt: skip


# ---------------------------------------------------------------- a trainer


def make_trainer(
    run: RunConfig, folder: Path | None = None, *, quiet: bool = False, communicator: Communicator | None = None
) -> Trainer:
    """Build the trainer of a run that has not started; the seed draws its network.

    Under torchrun every process calls this at the same time.
    """
    communicator = communicator or connect(run)
    if run.parallel != "none" and run.layout == "shared" and run.head_depth == 1:
        run = dataclasses.replace(run, fused=False)  # replicas reduce the gradients of one stage at a time
    with communicator.raise_on_one_rank():
        alphas = stage_alphas(run)
        data = make_data(run)
        torch.manual_seed(run.seed)
        network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    settings = {field.name: getattr(run, field.name) for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**settings | {"alpha": alphas, "device": process_device(run)})
    metadata = dataclasses.asdict(run) | {
        "crop": data.crop, "flip": data.flip, "depth": len(alphas), "run": dataclasses.asdict(run),
        "launch": launch_id(),
    }  # fmt: skip
    with communicator.watch():
        strategy = make_strategy(run, network, data, communicator)
        return Trainer(network, data, config, folder, strategy=strategy, metadata=metadata, quiet=quiet)


def process_device(run: RunConfig) -> str:
    """Return the name of this process's device."""
    return run.device if run.parallel == "none" else local_device(run.device)


def connect(run: RunConfig, problem: str = "") -> Communicator:
    """Connect to the processes that share a run. `problem` says what is wrong on this rank and ends all of them."""
    if run.parallel == "none":
        if world_size() > 1:
            raise ValueError(
                f"parallel must say how {world_size()} processes share the work: data, shard or stage, not none"
            )
        return Communicator(Topology())
    device = run.device
    try:
        pick_device(local_device(device))
    except ValueError as error:  # maybe on this rank only
        problem, device = problem or str(error), "cpu"
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in MOVABLE}
    settings |= {name: getattr(run, name) for name in PROCESSES}
    return init_distributed(
        run.parallel, settings, problem=problem, replicas=run.replicas, timeout=run.timeout, device=device
    )


def make_strategy(run: RunConfig, network: SIDNetwork, data: ImageData, communicator: Communicator) -> Strategy:
    """Return how this process takes part in a run."""
    if run.parallel == "none":
        return Strategy()
    if run.parallel == "stage":
        return StageStrategy(communicator, assign_stages(run, network, data, communicator), run.in_flight)
    shards = run.parallel == "shard" and communicator.topology.replicas > 1
    return ShardStrategy(communicator) if shards else DataStrategy(communicator)


def assign_stages(run: RunConfig, network: SIDNetwork, data: ImageData, communicator: Communicator) -> list[range]:
    """Return the stages of each rank of a pipeline, as asked for or balanced by what they cost on rank 0's machine."""
    topology, depth, counts = communicator.topology, len(network.stages), run.stages_per_rank
    if depth < topology.stage_ranks:
        communicator.abort_all(
            f"{topology.stage_ranks} ranks cannot share {depth} stages: start at most {depth} for each replica"
        )
    if counts is None:
        with communicator.raise_on_one_rank():
            measures = topology.rank == 0 and topology.stage_ranks > 1
            seconds = stage_seconds(run, network, data, topology.replicas) if measures else [1.0] * depth
        return balance_stages(communicator.gather(seconds)[0], topology.stage_ranks)
    if len(counts) != topology.stage_ranks or sum(counts) != depth or min(counts) < 1:
        communicator.abort_all(
            f"stages_per_rank must be {topology.stage_ranks} positive numbers whose sum is {depth}, not {counts}"
        )
    return [range(start, end) for start, end in pairwise([0, *accumulate(counts)])]


def stage_seconds(run: RunConfig, network: SIDNetwork, data: ImageData, replicas: int) -> list[float]:
    """Measure the seconds per batch of each stage on this process's device."""
    device = pick_device(process_device(run))
    batches = Batches(
        data.train, run.batch_size, device, *pixel_statistics(data.train.images), workers=run.workers,
        channels_last=run.channels_last, share=(0, replicas),
    )  # fmt: skip
    feed = chain.from_iterable(batches.shuffled(run.seed, epoch, data.crop, data.flip) for epoch in count())
    memory_format = torch.channels_last if run.channels_last else torch.contiguous_format
    copied = copy.deepcopy(network)
    copied.to(device, memory_format=memory_format)  # type: ignore[call-overload]  # missing from the stubs
    return measure_stage_seconds(copied, feed, StepOptions(dtype=DTYPES[run.dtype]), run.optimizer)


# ---------------------------------------------------------------- runs in folders


def start_run(run: RunConfig, folder: Path, *, overwrite: bool = False) -> Trainer:
    """Build the trainer of a new run, or resume this run if torchrun restarted its processes.

    Raises ValueError if the folder holds another run, unless that may be overwritten.
    """
    communicator, launch = connect(run), launch_id()
    with communicator.raise_on_one_rank():
        if launch is None and max_restarts() > 0:  # restarted processes could not tell their run from an older one
            raise ValueError("torchrun --max-restarts needs --standalone or an --rdzv-id to find the run again")
    restarted = any(communicator.gather(restart_count() > 0))  # a machine that joined later counts from 0
    resumes = restarted and launch is not None and recorded_launch(folder) == launch
    saved = communicator.gather(resumes and has_checkpoint(folder))
    with communicator.raise_on_one_rank():
        if any(saved) and not saved[communicator.topology.rank]:
            raise ValueError(
                f"{folder}: no run to go on with, but rank {saved.index(True)} has it: all processes need the same"
                " folder"
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
    """Return the id of the torchrun launch that last trained the run in a folder."""
    try:
        return json.loads((folder / CONFIG).read_text())["launch"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def saved_run(path: Path) -> tuple[RunConfig, dict]:
    """Return the settings and the state of a saved run. Raises ValueError."""
    state = load_checkpoint(path)
    try:
        return RunConfig(**state["config"]["run"]), state
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: was not saved by `sid train` of this version ({error})") from error


def resume_run(path: Path, *, quiet: bool = False, **moved: Any) -> Trainer:
    """Build the trainer of a saved run. `moved` are settings that may change: where things are, and the processes."""
    alone = {name: getattr(RunConfig, name) for name in PROCESSES}
    moved = alone | {name: value for name, value in moved.items() if value is not None}
    if moved["parallel"] != "none":
        moved = {"download": False} | moved  # the data were downloaded when the run started
    try:
        run = dataclasses.replace(saved_run(path)[0], **moved)
    except ValueError as error:  # the other ranks may have found it: they must not wait
        processes = {name: moved[name] for name in PROCESSES}
        connect(RunConfig(**processes, layout="stagewise", device="cpu"), problem=str(error))
        raise
    trainer = make_trainer(run, path if path.is_dir() else path.parent, quiet=quiet)
    trainer.resume(path)
    return trainer


def trained_network(path: Path) -> tuple[SIDNetwork, RunConfig, dict]:
    """Return a saved network on the CPU in evaluation mode, its settings, and the metadata of config.json."""
    run, state = saved_run(path)
    metadata = state["config"]
    network = make_network(run, len(metadata["classes"]), metadata["in_channels"], tuple(metadata["image_size"]))
    network.load_state_dict(state["network"])
    return network.eval(), run, metadata


def evaluate_run(path: Path, **moved: Any) -> dict:
    """Return the metrics of `evaluate` for a saved network on its test split, and the number of `images`."""
    network, run, metadata = trained_network(path)
    run = dataclasses.replace(run, **{name: value for name, value in moved.items() if value is not None})
    data = make_data(run)
    own = {"classes": data.classes, "in_channels": data.in_channels, "image_size": list(data.image_size)}
    check_same(path, metadata, own, own)
    mean, std = torch.tensor(metadata["pixel_mean"]), torch.tensor(metadata["pixel_std"])
    batches = Batches(data.test, run.batch_size, torch.device("cpu"), mean, std, workers=run.workers)
    options = StepOptions(metadata["alpha"], metadata["divergence"], run.label_smoothing, DTYPES[run.dtype])
    return evaluate(network, batches.in_order(), options) | {"images": len(data.test.labels)}
