"""A run from its settings: the data, the network and the trainer that a command or a checkpoint asks for."""

import copy
import dataclasses
import json
from itertools import accumulate, chain, count, pairwise
from pathlib import Path

import torch

from ..data.batches import Batches, pixel_statistics
from ..data.datasets import ImageData, load_data
from ..data.splits import with_label_noise, with_subset, with_validation
from ..distributed.balance import balanced, measure_stages
from ..distributed.rendezvous import (
    Place,
    gathered,
    join,
    own_device,
    refuse,
    restarted,
    said_once,
    tell_all,
    this_start,
    watching,
    world_size,
)
from ..distributed.state import PIPELINE
from ..methods.factory import LOCAL
from ..network.architectures import build_network
from ..network.modules import SIDNetwork
from ..training.checkpoint import LAST, PREVIOUS, check_same, load_checkpoint
from ..training.config import DTYPES, MOVABLE, PROCESSES, RunConfig, TrainConfig, is_plain, stage_alphas
from ..training.evaluation import evaluate
from ..training.trainer import Trainer, pick_device

PICTURE = "stages.png"


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
        fused=run.fused and run.method in LOCAL and run.schedule == "one-pass",
    )  # fmt: skip


def make_trainer(
    run: RunConfig, folder: Path | str | None = None, *, quiet: bool = False, place: Place | None = None
) -> Trainer:
    """The trainer of a run that has not begun; the seed draws its network. Of many processes each makes its own, all at
    the same time; `place` is this one's, where they have met."""
    place = place or meet(run)
    if place is not None and run.layout == "shared" and run.head_depth == 1:
        run = dataclasses.replace(run, fused=False)  # replicas reduce the gradients of one stage at a time
    with said_once(place):
        alphas = stage_alphas(run)
        data = make_data(run)
        torch.manual_seed(run.seed)
        network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    own = {field.name: getattr(run, field.name) for field in dataclasses.fields(TrainConfig)}
    own["alpha"] = alphas
    about = dataclasses.asdict(run) | {
        "crop": data.crop, "flip": data.flip, "depth": len(alphas), "run": dataclasses.asdict(run),
        "torchrun": place.start if place else this_start(),
    }  # fmt: skip
    if place is None:
        return Trainer(network, data, TrainConfig(**own), folder, about=about, quiet=quiet)
    from ..distributed.trainer import ParallelTrainer

    own["device"] = own_device(run.device)
    with watching(place, "another rank"):
        parts = stages_of_ranks(run, network, place, data) if run.parallel == "stage" else None
        return ParallelTrainer(
            network, data, TrainConfig(**own), folder, place=place, parts=parts, in_flight=run.in_flight,
            sharded=run.parallel == "shard", about=about, quiet=quiet,
        )  # fmt: skip


def meet(run: RunConfig, wrong: str | None = None) -> Place | None:
    """This process among those that share the run; None where it is alone. wrong: what is, where it has no run."""
    if run.parallel == "none":
        if world_size() > 1:
            raise ValueError(
                f"parallel must say how {world_size()} processes share the work: data, shard or stage, not none"
            )
        return None
    device = run.device
    try:
        pick_device(own_device(device))
    except ValueError as error:  # perhaps on this rank alone: the others must hear it
        wrong, device = wrong or str(error), "cpu"
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in MOVABLE}
    settings |= {name: getattr(run, name) for name in PROCESSES}
    return join(run.parallel, wrong or settings, replicas=run.replicas, timeout=run.timeout, device=device)


def stages_of_ranks(run: RunConfig, network: SIDNetwork, place: Place, data: ImageData) -> list[range]:
    """Consecutive stages for each rank of the pipeline, balanced by what they cost on rank 0's machine."""
    depth = len(network.stages)
    if depth < place.stages:
        refuse(place, f"{place.stages} ranks cannot share {depth} stages: start at most {depth} for each replica")
    counts = run.stages_per_rank
    if counts is None:
        seconds = None
        if place.stages > 1:
            with said_once(place):
                seconds = measured_seconds(run, network, place, data) if place.rank == 0 else None
        counts = [len(part) for part in balanced(tell_all(place, seconds) or [1.0] * depth, place.stages)]
    if len(counts) != place.stages or sum(counts) != depth or min(counts) < 1:
        refuse(place, f"stages_per_rank must be {place.stages} positive numbers whose sum is {depth}, not {counts}")
    edges = [0, *accumulate(counts)]
    return [range(a, b) for a, b in pairwise(edges)]


def measured_seconds(run: RunConfig, network: SIDNetwork, place: Place, data: ImageData) -> list[float]:
    """Of a batch in each stage; the first one's has the loading, too."""
    device = pick_device(own_device(run.device))
    batches = Batches(
        data.train, run.batch_size, device, *pixel_statistics(data.train.images), workers=run.workers,
        channels_last=run.channels_last, share=(0, place.replicas),
    )  # fmt: skip
    feed = chain.from_iterable(batches.shuffled(run.seed, number, data.crop, data.flip) for number in count())
    inputs, labels = next(feed)
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    network = copy.deepcopy(network).to(device, memory_format=layout)
    options = {"optimizer": run.optimizer, "dtype": DTYPES[run.dtype], "rounds": 3, "feed": feed}
    return [cost.seconds for cost in measure_stages(network, inputs, labels, **options)]


def begun(run: RunConfig, folder: Path, *, overwrite: bool = False) -> Trainer:
    """The trainer of a new run; or, where torchrun starts processes anew, of what the lost ones had saved."""
    place = meet(run)
    again = any(gathered(place, restarted()))  # on a machine that joined later it is the first start
    start = place.start if place else this_start()
    own = again and start is not None and recorded_start(folder) == start
    saved = own and any((folder / name).exists() for name in (LAST, PREVIOUS))
    everywhere = gathered(place, saved)
    with said_once(place):
        if any(everywhere) and not saved:
            raise ValueError(
                f"{folder}: no run to go on with, but rank {everywhere.index(True)} has it: all processes need the same"
                " folder"
            )
        if (folder / "config.json").exists() and not (overwrite or own):
            raise ValueError(f"{folder}: holds a run already; choose another --out, --resume it, or give --overwrite")
    trainer = make_trainer(run, folder, place=place)
    if saved:
        trainer.resume()
    elif trainer.records:
        for stale in (LAST, PREVIOUS, PICTURE, PIPELINE, *(path.name for path in folder.glob("events.out.tfevents.*"))):
            (folder / stale).unlink(missing_ok=True)
    return trainer


def recorded_start(folder: Path) -> str | None:
    """Of torchrun, by which the run in a folder was trained last."""
    try:
        return json.loads((folder / "config.json").read_text())["torchrun"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


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
    alone = {name: getattr(RunConfig, name) for name in PROCESSES}
    moved = alone | {name: value for name, value in moved.items() if value is not None}
    if moved["parallel"] != "none":
        moved = {"download": False} | moved  # it was fetched when the run began
    try:
        run = dataclasses.replace(saved_run(place)[0], **moved)
    except ValueError as error:  # the others, who may have found it, must not wait
        meet(RunConfig(**{name: moved[name] for name in PROCESSES}, layout="stagewise", device="cpu"), wrong=str(error))
        raise
    trainer = make_trainer(run, place if place.is_dir() else place.parent, quiet=quiet)
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
