"""The training loop around a method's step: epochs, evaluation, checkpoints. It holds no algorithm."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batches, pixel_statistics
from ..data.datasets import ImageData
from ..methods.capture import capture
from ..methods.common import StepOptions
from ..methods.factory import cascade_bytes, make_lr_scheduler, make_optimizers, make_step
from ..methods.streams import stage_streams
from ..network.modules import SIDNetwork
from .checkpoint import check_same, load_checkpoint, save_checkpoint, set_aside_damaged
from .config import DTYPES, TrainConfig
from .cpu import denormals_as_zero
from .evaluation import means, tally
from .logs import Log
from .memory import SavedBytes, forget_peak, peak_memory

DATA = ("classes", "in_channels", "image_size", "train_images", "pixel_mean")  # what tells whether data are the same


class NonFiniteLoss(RuntimeError):
    """A stage's loss, or what was to be saved, is infinite or NaN; the message names stage, epoch, step and learning
    rate."""


class Interrupted(Exception):
    """The run was asked to stop, between two steps, and has been saved."""


class Trainer:
    """Trains `network` on `data`; with a folder, keeps there what `Log` and `save_checkpoint` write.

    `metrics` holds one dict an epoch, the lines of metrics.jsonl. On a CPU a run that was stopped, or killed, and
    resumed ends in the same bits as one left alone, given the same number of threads and the same PyTorch.

    Args:
        about: what else config.json and the checkpoint shall say of the run.
        quiet: no progress bar and no table.
    """

    def __init__(
        self,
        network: SIDNetwork,
        data: ImageData,
        config: TrainConfig,
        folder: Path | str | None = None,
        *,
        about: dict | None = None,
        quiet: bool = False,
    ):
        self.config, self.data, self.quiet = config, data, quiet
        self.folder = None if folder is None else Path(folder)
        self.device = pick_device(config.device)
        self.dtype = DTYPES[config.dtype]
        self.network = self.placed(network)
        depth = len(network.stages)
        self.alphas = list(config.alpha) if isinstance(config.alpha, Sequence) else [config.alpha] * depth
        if len(self.alphas) != depth:
            raise ValueError(f"alpha must be one number or one for each of the {depth} stages, not {len(self.alphas)}")
        parameters = sum(p.numel() for p in network.parameters())
        statistics = mean, std = pixel_statistics(data.train.images)
        about = {**(about or {}), **asdict(config), "alpha": self.alphas, "num_parameters": parameters}
        about |= {
            "classes": data.classes,
            "in_channels": data.in_channels,
            "image_size": data.image_size,
            "train_images": len(data.train.labels),
            "pixel_mean": mean.tolist(),
            "pixel_std": std.tolist(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        self.about = json.loads(json.dumps(about, default=str))
        parts = {"train": data.train, "test": data.test, "val": data.validation}
        self.batches = {
            name: Batches(split, config.batch_size, self.device, *statistics, workers=config.workers,
                          channels_last=config.channels_last)
            for name, split in parts.items() if split is not None
        }  # fmt: skip
        self.make_optimizers()
        self.judging = {
            "divergence": config.divergence, "label_smoothing": config.label_smoothing, "dtype": self.dtype,
        }  # fmt: skip
        # A mask may be infinite from the start; the rest must stay finite.
        self.begun_finite = {
            name for name, value in network.state_dict().items() if value.is_meta or value.isfinite().all()
        }
        self.epoch, self.step = 1, 0  # the epoch that is in work, and how many of its steps are done
        self.sums: dict[str, float | list[float]] = {}  # of the epoch in work, over its images so far
        self.lr: float | Tensor = config.lr  # of the last step
        self.metrics: list[dict] = []
        self.activation_bytes: int | None = None
        self.stop: list[int] = []  # the signals that asked for an end
        self.records = True  # whether this process keeps the run's folder
        self.hears = True  # whether signals end the run here; else another process tells
        self.own = range(depth)  # the stages that learn in this process

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.channels_last else torch.contiguous_format

    def placed(self, network: SIDNetwork) -> SIDNetwork:
        return network.to(self.device, memory_format=self.memory_format)

    def make_optimizers(self) -> None:
        config = self.config
        self.optimizers = make_optimizers(
            self.network, config.method, optimizer=config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
            step_schedule=config.schedule,
        )  # fmt: skip
        steps = config.epochs * len(self.batches["train"])
        self.schedulers = [make_lr_scheduler(o, config.lr_schedule, config.lr, steps) for o in self.optimizers if o]
        self.options = StepOptions(
            self.alphas, config.divergence, config.label_smoothing, self.dtype, config.schedule, config.fused
        )
        hooks = stage_streams(self.device, len(self.alphas)) if config.streams else None
        self.run_step = make_step(config.method, self.network, self.optimizers, self.options, hooks)

    def fit(self) -> list[dict]:
        """Train what is left of all epochs. Raises NonFiniteLoss, and Interrupted when SIGINT or SIGTERM asked for an
        end."""
        forget_peak(self.device)
        folder = self.folder if self.records else None
        with stop_requests(self.hears) as self.stop, Log(folder, self.about, self.metrics, self.quiet) as log:
            while self.epoch <= self.config.epochs:
                self.train_epoch()
                row = self.row({"sums": self.sums, "tallies": self.evaluate(), "peak": peak_memory(self.device)})
                self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
                if self.records:
                    self.metrics.append(row)
                self.save()  # before the row is told: what metrics.jsonl holds, the checkpoint holds
                if self.records:
                    log.add(row)
        return self.metrics

    def train_epoch(self) -> None:
        """Every training image once, or what is left of it; `sums` grow by what was learned on the way."""
        from tqdm import tqdm

        self.network.train()
        config, images, steps = self.config, len(self.data.train.labels), len(self.batches["train"])
        check_every = 1 if self.device.type == "cpu" else 20  # steps; elsewhere to look at a loss waits for the device
        batches = self.batches["train"].shuffled(config.seed, self.epoch, self.data.crop, self.data.flip, self.step)
        done = images if self.step == steps else self.step * config.batch_size
        bar = tqdm(
            total=images, initial=done, desc=f"epoch {self.epoch}/{config.epochs}", unit=" images", leave=False,
            disable=True if self.quiet else None,
        )  # fmt: skip
        pending, right = [], torch.zeros((), dtype=torch.int64, device=self.device)
        start = time.perf_counter()
        with bar, contextlib.closing(batches), denormals_as_zero():
            for inputs, targets in batches:
                result = self.one_step(inputs, targets)
                self.step += 1
                pending.append(result.stage_loss.detach() * len(targets))
                right += (result.logits.argmax(dim=1) == targets).sum()
                saves = config.save_every and self.step % config.save_every == 0
                if self.step % check_every == 0 or self.step == steps or saves or self.stopping():
                    now = time.perf_counter()
                    self.add_up(self.finite(torch.stack(pending)), right.item(), now - start)
                    pending, start = [], now
                    right.zero_()
                    seen = images if self.step == steps else self.step * config.batch_size
                    memory = f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if targets.is_cuda else ""
                    loss = sum(self.sums["loss"]) / len(self.sums["loss"]) / seen
                    bar.set_postfix_str(f"loss {loss:.4f}{memory}", refresh=False)
                    bar.update(seen - done)
                    done = seen
                if saves and self.step < steps:
                    self.save()
                if self.stopping():
                    self.save()
                    again = f"; sid train --resume {self.folder} goes on" if self.folder else ""
                    raise Interrupted(f"stopped in epoch {self.epoch} after step {self.step}{again}")

    def stopping(self) -> bool:
        """Whether the run is to end after the step in work."""
        return bool(self.stop)

    def row(self, found: dict) -> dict:
        """What an epoch has shown. Losses are means over images, `train_loss` also over stages; the training accuracy
        is the last stage's, on cropped and flipped images, before each update. On the test split every stage's
        accuracy, KL(y || p_i) and certificate rate; on a validation split the accuracy."""
        sums, images = found["sums"], len(self.data.train.labels)
        losses, seconds = sums["loss"], sums["seconds"]
        test = means(*found["tallies"]["test"])
        row = {
            "epoch": self.epoch,
            "step": self.epoch * len(self.batches["train"]),
            "lr": sums["lr"],
            "train_loss": sum(losses) / len(losses) / images,
            "train_accuracy": sums["right"] / images,
            "stage_loss": [loss / images for loss in losses],
            "images_per_second": images / seconds,
            "seconds": seconds,
            "elapsed": sum(row["seconds"] for row in self.metrics) + seconds,
            "activation_bytes": self.activation_bytes,
            "test_accuracy": test["accuracy"][-1],
            "stage_accuracy": test["accuracy"],
            "stage_kl": test["kl"],
            "certificate": test["certificate"],
        }
        if "val" in found["tallies"]:
            row["val_accuracy"] = means(*found["tallies"]["val"])["accuracy"][-1]
        return row | {"peak_memory_bytes": found["peak"]}

    def one_step(self, inputs: Tensor, targets: Tensor):
        """One update of network, optimizers and learning rates. The first of a run is also looked at for what autograd
        holds; with `graph`, the second is captured, and batches of its size replay it."""
        if self.activation_bytes is None:
            with SavedBytes(self.network.parameters()) as saved:
                result = self.run_step(inputs, targets)
            by_cascade = cascade_bytes(self.network, self.config.method, len(targets), self.options)
            self.activation_bytes = saved.peak + by_cascade
        elif self.config.graph and inputs.is_cuda and len(targets) == self.config.batch_size:
            if not hasattr(self, "captured"):
                own = [optimizer for optimizer in self.optimizers if optimizer]
                self.captured = capture(self.run_step, (inputs, targets), network=self.network, optimizers=own)
            result = self.captured(inputs, targets)
        else:
            result = self.run_step(inputs, targets)
        self.lr = self.schedulers[0].get_last_lr()[0]
        for scheduler in self.schedulers:
            scheduler.step()
        return result

    def add_up(self, losses: Tensor, right: int, seconds: float) -> None:
        """The last steps' losses (steps, L), one by one in order: the sums do not depend on when they are looked at."""
        sums = self.sums or {"loss": [0.0] * losses.shape[1], "right": 0, "seconds": 0.0}
        for row in losses.tolist():
            sums["loss"] = [a + b for a, b in zip(sums["loss"], row, strict=True)]
        added = {"right": sums["right"] + right, "seconds": sums["seconds"] + seconds}
        self.sums = sums | added | {"lr": float(self.lr)}

    def finite(self, losses: Tensor) -> Tensor:
        """The last steps' losses (steps, L) in float64 on the CPU, if they are all finite."""
        losses = losses.double().cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            row, stage = bad[0].tolist()
            step = self.step - len(losses) + 1 + row
            stage = (self.own[stage] if losses.shape[1] == len(self.own) else self.own[-1]) + 1
            value = losses[tuple(bad[0])].item()
            raise self.non_finite(f"the loss of stage {stage} is {value} in epoch {self.epoch}, step {step}")
        return losses

    def non_finite(self, what: str) -> NonFiniteLoss:
        kept = self.folder and any((self.folder / name).exists() for name in ("last.pt", "previous.pt"))
        return NonFiniteLoss(
            f"{what} (learning rate {float(self.lr):g}, {self.config.dtype});"
            f" {'the last good checkpoint is kept' if kept else 'nothing was saved yet'}"
        )

    def evaluate(self) -> dict[str, tuple[Tensor, int]]:
        """`tally` of each split that is not trained on."""
        found = {}
        for name in [name for name in self.batches if name != "train"]:
            found[name] = tally(self.network, self.batches[name].in_order(), self.alphas, **self.judging)
        return found

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> None:
        if self.folder:
            save_checkpoint(self.folder, self.state())

    def state(self) -> dict:
        """What a checkpoint holds. Raises NonFiniteLoss where the last update left the network infinite or NaN."""
        network = self.whole(self.network.state_dict())
        for name, value in network.items():
            if name in self.begun_finite and not value.is_meta and not value.isfinite().all():
                epoch, step = (self.epoch, self.step) if self.step else (self.epoch - 1, len(self.batches["train"]))
                raise self.non_finite(f"{parameter_place(name, value)} is not finite after epoch {epoch}, step {step}")
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": self.about,
            "epoch": self.epoch,
            "step": self.step,
            "network": network,
            "optimizers": self.whole([optimizer and optimizer.state_dict() for optimizer in self.optimizers]),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "random": random,
            "sums": self.sums,
            "metrics": json.dumps([self.metrics, self.activation_bytes]),
        }

    def resume(self, place: Path | str | None = None) -> None:
        """Go on from a checkpoint of this very run: its folder's, or the file `place`. Raises as `found` does."""
        self.adopt(self.found(place))

    def found(self, place: Path | str | None = None) -> dict:
        """The state to go on from. Raises ValueError where there is none that is whole, or it belongs to another
        network or other settings."""
        place = self.folder if place is None else Path(place)
        state = load_checkpoint(place)
        settings = [name for name in asdict(self.config) if name not in ("device", "workers", "save_every")]
        check_same(place, state["config"], self.about, (*settings, *DATA))
        if odd := unlike(state["network"], self.network.state_dict()):
            raise ValueError(f"{place}: is of another network ({odd})")
        for name in ("threads", "torch"):
            if state["config"].get(name) != self.about[name] and not self.quiet:
                print(
                    f"{name}: {state['config'].get(name)} then, {self.about[name]} now: the bits will not be the same"
                )
        if self.records and self.folder and place != self.folder and (aside := set_aside_damaged(self.folder)):
            if not self.quiet:
                print(f"{self.folder / 'last.pt'} is damaged and is now {aside.name}")
        return state

    def whole(self, state: Any) -> Any:
        """What is in pieces in other processes, whole."""
        return state

    def load(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer:
                optimizer.load_state_dict(saved)

    def adopt(self, state: dict) -> None:
        self.load(state)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.metrics, self.activation_bytes = json.loads(state["metrics"])


def parameter_place(name: str, value: Tensor) -> str:
    """Name an entry of a state dict that is not finite, for example "body.0.weight of stage 2"."""
    kind, _, rest = name.partition(".")
    number, _, parameter = rest.partition(".")
    if kind != "stages":
        return name
    if number.isdigit():
        return f"{parameter} of stage {int(number) + 1}"
    stage = int(value.flatten(1).isfinite().all(1).int().argmin())  # StackedHeads: the first dimension is the stage
    return f"{rest} of stage {stage + 1}"


def unlike(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """The first difference between two state dicts in what they hold, in words."""
    for name in [*own, *saved]:
        shapes = [tuple(state[name].shape) if name in state else "nothing" for state in (saved, own)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} there and {shapes[1]} here"
    return None


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator PyTorch sees, or the CPU; any other name must be a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]})") from error
    return device


@contextmanager
def stop_requests(heard: bool = True) -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM only add to the yielded list, so that a run ends between two steps.

    A second SIGINT is an ordinary KeyboardInterrupt. Outside the main thread signals stay as they are.
    """
    received: list[int] = []

    def note(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if heard:
            print("stopping after this step, the run is saved ...", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
