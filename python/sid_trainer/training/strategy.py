"""Place a trainer's work: `Strategy` uses this process alone, and its subclasses share the work among processes."""

import copy
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batches, pixel_statistics
from ..data.datasets import ImageData
from ..data.own import OwnData
from ..methods.capture import CapturedStep, capture
from ..methods.common import StepOptions, StepResult
from ..methods.factory import cascade_bytes, make_lr_scheduler, make_optimizers, make_step
from ..methods.readouts import in_parts
from ..methods.streams import StageHooks, stage_streams
from ..network.own import Network
from .config import DTYPES, TrainConfig, by_depth
from .evaluation import stage_logits, sum_metrics
from .memory import SavedBytes


class Strategy:
    """The strategy of a single process, which trains the whole network.

    `Trainer` calls `setup` once. It creates `optimizers`, `schedulers`, `batches` (by split) and `local_stages`, the
    stages that this process trains. `stop_signals` lists the signals received that ask the run to stop.
    """

    writes_run_folder = True
    handles_signals = True
    is_alone = True  # no other process takes part

    def setup(self, network: Network, data: ImageData | OwnData, config: TrainConfig) -> None:
        """Place the network, load the data and build the step. Raises ValueError for settings that do not fit."""
        self.network, self.data, self.config = network, data, config
        self.device = pick_device(config.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        smoothing = by_depth("label_smoothing", config.label_smoothing, network.depth)
        self.options = StepOptions(
            by_depth("alpha", config.alpha, network.depth), config.divergence,
            smoothing if len(set(smoothing)) > 1 else smoothing[0], DTYPES[config.dtype], config.schedule, config.fused,
            class_weight=network.loss_options.class_weight,
        )  # fmt: skip
        self.local_stages = self.assign_stages()
        alphas = self.options.stage_alphas(network.depth)
        self.local_options = replace(self.options, alpha=[alphas[i] for i in self.local_stages])
        if isinstance(self.options.label_smoothing, list):
            self.local_options = replace(self.local_options, label_smoothing=[smoothing[i] for i in self.local_stages])
        none = torch.zeros(0), torch.ones(0)  # OwnData is not normalized
        self.pixel_mean, self.pixel_std = none if isinstance(data, OwnData) else pixel_statistics(data.train.images)
        splits = {"train": data.train, "test": data.test, "val": data.validation}
        self.batches = {name: self.make_batches(name, split) for name, split in splits.items() if split is not None}
        self.check_smallest_batch(min(self.batches["train"].sizes()))
        self.place_network()
        self.optimizers = make_optimizers(
            network, config.method, optimizer=config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
            step_schedule=config.schedule,
        )  # fmt: skip
        steps = config.epochs * len(self.batches["train"])
        self.schedulers = [make_lr_scheduler(o, config.lr_schedule, config.lr, steps) for o in self.optimizers if o]
        self.step = self.make_step()
        self.captured_step: CapturedStep | None = None
        self.activation_bytes: int | None = None  # held for backward in the first step of the run
        self.stop_signals: list[int] = []

    def assign_stages(self) -> range:
        """Return the stages that this process trains, counted from 0."""
        return range(self.network.depth)

    def make_batches(self, name: str, split: Any) -> Any:
        """Return this process's batches of a split."""
        if isinstance(self.data, OwnData):
            config = self.config
            return self.data.make_batches(split, config.batch_size, self.device, name == "train", config.workers)
        return Batches(
            split, self.config.batch_size, self.device, self.pixel_mean, self.pixel_std, workers=self.config.workers,
            channels_last=self.config.channels_last,
        )  # fmt: skip

    def check_smallest_batch(self, images: int) -> None:
        """Raise ValueError if the smallest batch has one image and the network's batch-norm cannot train on it."""
        if images > 1:
            return
        data, trial = self.data, copy.deepcopy(self.network).train()
        inputs = data.example() if isinstance(data, OwnData) else torch.zeros(1, data.in_channels, *data.image_size)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                trial(inputs)
        except ValueError as error:
            raise ValueError(
                f"batch_size {self.config.batch_size} leaves a process a single image to train on, which is too few for"
                " batch-norm; choose another one"
            ) from error

    def place_network(self) -> None:
        """Move the network to the device."""
        self.network.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]  # missing from the stubs

    def make_step(self) -> Any:
        """Return the function that updates the network on inputs (B, ...) and targets (B,)."""
        return make_step(self.config.method, self.network, self.optimizers, self.options, self.make_hooks())

    def make_hooks(self) -> StageHooks:
        """Return the hooks around the stages of a step."""
        return stage_streams(self.device, len(self.local_stages)) if self.config.streams else StageHooks()

    # ---------------------------------------------------------------- an epoch

    def train_batches(self, epoch: int, first_step: int) -> Generator[tuple[Any, Tensor]]:
        """Yield the training batches of an epoch, starting at step `first_step`, counted from 0."""
        data, batches = self.data, self.batches["train"]
        yield from batches.shuffle(self.config.seed, epoch, data.crop, data.flip, first_step)

    def run_step(self, inputs: Any, targets: Tensor) -> StepResult:
        """Update the network on one batch.

        The first step of a run measures `activation_bytes`. With `graph` on a GPU, the next step on a full batch is
        captured, and replayed for every full batch.
        """
        if self.activation_bytes is None:
            with SavedBytes(self.network.parameters()) as saved:
                result = self.step(inputs, targets)
            cascade = cascade_bytes(self.network, self.config.method, len(targets), self.options)
            self.activation_bytes = saved.peak + cascade
            return result
        if not (self.config.graph and inputs.is_cuda and len(targets) == self.config.batch_size):
            return self.step(inputs, targets)
        if self.captured_step is None:
            optimizers = [optimizer for optimizer in self.optimizers if optimizer]
            self.captured_step = capture(self.step, (inputs, targets), network=self.network, optimizers=optimizers)
        return self.captured_step(inputs, targets)

    def should_stop(self) -> bool:
        """Return whether the run stops after the current step."""
        return bool(self.stop_signals)

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[Tensor, int]]:
        """Return the results of `sum_metrics` for the local stages, by split; "train" is left out."""
        self.network.eval()
        splits = [name for name in self.batches if name != "train"]
        return {
            name: sum_metrics(self.evaluation_batches(name), self.stage_logits, self.local_options) for name in splits
        }

    def evaluation_batches(self, name: str) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches of a split in order."""
        return in_parts(self.network, self.batches[name].in_order())

    def stage_logits(self, inputs: Any) -> tuple[list[Tensor], Tensor]:
        """Return the logits (B, C) of each local stage and the prior (B, C) of the first of them."""
        return stage_logits(self.network, inputs, self.options.dtype)

    def running(self) -> AbstractContextManager[None]:
        """Return the context in which `Trainer.fit` runs."""
        return nullcontext()

    # ---------------------------------------------------------------- results and checkpoints

    def gather_epoch(self, results: dict) -> dict | None:
        """Return the combined results of all processes, or None if another process writes the run's folder."""
        return results

    def gather_state(self, state: dict) -> dict | None:
        """Return the checkpoint combined from the states of all processes, or None if another process writes it."""
        return state

    def state_dict(self) -> dict:
        """Return the state of network, optimizers and schedulers in this process."""
        return {
            "network": self.network.state_dict(),
            "optimizers": [optimizer and optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load_state_dict(self, state: dict) -> None:
        """Load a state that `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer:
                optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)

    def local_state(self, state: dict) -> dict:
        """Return the part of a checkpoint that this process loads."""
        return state

    def raise_on_one_rank(self) -> AbstractContextManager[None]:
        """Return a context in which a ValueError or OSError on one rank ends all processes with one message."""
        return nullcontext()

    def check_same(self, values: dict) -> None:
        """Raise ValueError if the processes have different values."""


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU if there is one, else the CPU. Raises ValueError if unusable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]})") from error
    return device
