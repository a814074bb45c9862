"""The training loop around a method's step: epochs, evaluation and checkpoints, but no algorithm."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import DataError, ImageData
from ..data.own import OwnData
from ..files import nonempty_path
from ..methods.common import StepResult
from ..network.own import Network
from .checkpoint import LAST, REPLACED, check_same, has_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .cpu import denormals_as_zero
from .evaluation import first_non_finite_stage, means
from .logs import Log
from .memory import peak_memory, reset_peak_memory
from .strategy import Strategy

# A run resumes only on data for which these are equal.
DATA_FIELDS = ("classes", "in_channels", "image_size", "train_images", "pixel_mean")


class NonFiniteLoss(RuntimeError):
    """Raised if a loss, metric or parameter is infinite or NaN; names stage, epoch, step and learning rate."""


class Interrupted(Exception):
    """Raised after a signal stopped the run between two steps; the run is saved if it has a folder."""


class Trainer:
    """Train a network for the epochs that `config` sets.

    `metrics` holds one dict per epoch, the lines of metrics.jsonl. On a CPU, a stopped or killed run that is resumed
    ends with the same bits as an uninterrupted one, given the same number of threads and the same PyTorch version.

    Args:
        network: The network, trained in place.
        data: Image data, or your own inputs and classes as `OwnData`.
        folder: Folder for checkpoints, config.json, metrics.jsonl and TensorBoard events; None writes nothing.
        strategy: Where the work runs; None is this process alone.
        metadata: Additional entries for config.json and the checkpoints.
        quiet: Print no progress bar and no table.

    Raises ValueError for settings that do not fit the network, the data or the device.
    """

    def __init__(
        self, network: Network, data: ImageData | OwnData, config: TrainConfig, folder: Path | str | None = None, *,
        strategy: Strategy | None = None, metadata: dict | None = None, quiet: bool = False,
    ):  # fmt: skip
        self.folder = None if folder is None else nonempty_path(folder, "folder")
        if not isinstance(network, Network):
            raise ValueError(f"network must be what `cut` or `build_network` return, not a {type(network).__name__}")
        if not isinstance(data, (ImageData, OwnData)):
            raise ValueError(
                f"data must be OwnData(train, test) or what `load_data` returns, not a {type(data).__name__}"
            )
        self.network, self.data, self.config = network, data, config
        # A tensor that is infinite from the start, such as a mask, may stay so.
        self.finite_names = {name for name, value in network.state_dict().items() if value.isfinite().all()}
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.strategy = strategy or Strategy()
        self.strategy.setup(network, data, config)
        self.quiet = quiet or not self.strategy.writes_run_folder
        metadata = (metadata or {}) | asdict(config)
        metadata |= {
            "alpha": list(self.strategy.options.stage_alphas(network.depth)),
            "label_smoothing": self.strategy.options.label_smoothing,
            "num_parameters": parameters,
            "classes": data.classes or [str(i) for i in range(network.num_classes)],
            "in_channels": data.in_channels,
            "image_size": data.image_size,
            "unit": data.unit,
            "train_images": self.strategy.batches["train"].count,
            "pixel_mean": self.strategy.pixel_mean.tolist(),
            "pixel_std": self.strategy.pixel_std.tolist(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        self.metadata = json.loads(json.dumps(metadata, default=str))
        self.epoch, self.step = 1, 0  # the current epoch, and how many of its steps are done
        self.sums: dict = {}  # losses, correct answers and seconds of the current epoch so far
        self.lr: float | Tensor = config.lr  # of the last step
        self.metrics: list[dict] = []

    @property
    def steps_per_epoch(self) -> int:
        return len(self.strategy.batches["train"])

    def fit(self) -> list[dict]:
        """Train the remaining epochs and return `metrics`.

        Raises NonFiniteLoss, Interrupted after SIGINT or SIGTERM, and DataError if images cannot be read.
        """
        strategy = self.strategy
        reset_peak_memory(strategy.device)
        strategy.check_same({name: self.metadata[name] for name in DATA_FIELDS})
        log = Log(self.folder if strategy.writes_run_folder else None, self.metadata, self.metrics, self.quiet)
        with stop_requests(strategy.handles_signals) as strategy.stop_signals, log, strategy.running():
            while self.epoch <= self.config.epochs:
                try:
                    self.train_epoch()
                    metrics = self.evaluate()
                except DataError as error:
                    raise self.save_after(error) from error
                results = strategy.gather_epoch(
                    {"sums": self.sums, "metrics": metrics, "memory": peak_memory(strategy.device)}
                    | {"activation_bytes": strategy.activation_bytes}
                )
                row = None
                if results is not None:
                    row = self.summarize_epoch(results) | log.write_pipeline(results.get("pipeline"))
                    self.metrics.append(row)
                self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
                self.save()  # before the log: every epoch in metrics.jsonl is in a checkpoint
                if row is not None:
                    log.add(row)
        return self.metrics

    def train_epoch(self) -> None:
        """Train on the remaining images of the current epoch and update `sums`."""
        from tqdm import tqdm

        self.network.train()
        config, strategy, images = self.config, self.strategy, self.strategy.batches["train"].count
        interval = 1 if strategy.device.type == "cpu" else 20  # steps; reading a loss waits for the device
        losses: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=strategy.device)
        bar = tqdm(
            total=images, initial=self.images_done(), desc=f"epoch {self.epoch}/{config.epochs}", leave=False,
            unit=f" {self.data.unit}", disable=True if self.quiet else None,
        )  # fmt: skip
        batches = strategy.train_batches(self.epoch, self.step)
        start = time.perf_counter()

        def read_losses() -> None:
            nonlocal losses, start
            now = time.perf_counter()
            self.add_losses(torch.stack(losses), int(correct), now - start)
            losses, start = [], now
            correct.zero_()

        with bar, contextlib.closing(batches), denormals_as_zero():
            try:
                for inputs, targets in batches:
                    result = self.train_step(inputs, targets)
                    self.step += 1
                    losses.append(result.stage_loss.detach() * len(targets))
                    correct += result.correct(targets)
                    saves = config.save_every > 0 and self.step % config.save_every == 0
                    stops = strategy.should_stop()
                    if self.step % interval == 0 or self.step == self.steps_per_epoch or saves or stops:
                        read_losses()
                        memory = f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if targets.is_cuda else ""
                        loss = sum(self.sums["loss"]) / len(self.sums["loss"]) / self.images_done()
                        bar.set_postfix_str(f"loss {loss:.4f}{memory}", refresh=False)
                        bar.update(self.images_done() - bar.n)
                    if stops or (saves and self.step < self.steps_per_epoch):
                        self.save()
                    if stops:
                        resume = f"; sid train --resume {self.folder} continues it" if self.folder else ""
                        raise Interrupted(f"stopped in epoch {self.epoch} after step {self.step}{resume}")
            except DataError:
                if losses:
                    read_losses()
                raise

    def images_done(self) -> int:
        """Return the number of images on which the current epoch has trained so far."""
        return sum(self.strategy.batches["train"].sizes()[: self.step])

    def train_step(self, inputs: Tensor, targets: Tensor) -> StepResult:
        """Update the network on one batch, then step the schedulers."""
        result = self.strategy.run_step(inputs, targets)
        self.lr = self.strategy.schedulers[0].get_last_lr()[0]
        for scheduler in self.strategy.schedulers:
            scheduler.step()
        return result

    def add_losses(self, losses: Tensor, correct: int, seconds: float) -> None:
        """Add the losses (steps, L) of the last steps, their correct answers and seconds to `sums`.

        Steps are added one by one, so the sums do not depend on how often this is called. Raises NonFiniteLoss.
        """
        losses = losses.double().cpu()
        if not losses.isfinite().all():
            row, column = (~losses.isfinite()).nonzero()[0].tolist()
            stages = self.strategy.local_stages
            stage = (stages[column] if losses.shape[1] == len(stages) else stages[-1]) + 1
            step = self.step - len(losses) + 1 + row
            loss = losses[row, column].item()
            raise self.non_finite(f"the loss of stage {stage} is {loss} in epoch {self.epoch}, step {step}")
        sums = self.sums or {"loss": [0.0] * losses.shape[1], "right": 0, "seconds": 0.0}
        for stage_losses in losses.tolist():
            sums["loss"] = [a + b for a, b in zip(sums["loss"], stage_losses, strict=True)]
        added = {"right": sums["right"] + correct, "seconds": sums["seconds"] + seconds}
        self.sums = sums | added | {"lr": float(self.lr)}

    def evaluate(self) -> dict[str, tuple[Tensor, int]]:
        """Return the results of `sum_metrics` for the local stages, by split. Raises NonFiniteLoss."""
        metrics = self.strategy.evaluate()
        for split, (sums, _) in metrics.items():
            if (column := first_non_finite_stage(sums)) is not None:
                self.state_dict()  # raises an error that names the parameter, if one is not finite
                stage = self.strategy.local_stages[column] + 1
                raise self.non_finite(f"stage {stage} is not finite on the {split} images after epoch {self.epoch}")
        return metrics

    def non_finite(self, problem: str) -> NonFiniteLoss:
        saved = self.folder and has_checkpoint(self.folder)
        checkpoint = "the last good checkpoint is kept" if saved else "nothing was saved yet"
        return NonFiniteLoss(f"{problem} (learning rate {float(self.lr):g}, {self.config.dtype}); {checkpoint}")

    def summarize_epoch(self, results: dict) -> dict:
        """Return the row of metrics.jsonl for the current epoch.

        Losses are means over images, and `train_loss` also over stages. `train_accuracy` is the last stage's, before
        each update and on augmented images. `stage_accuracy`, `stage_kl` and `certificate` are those of `evaluate` on
        the test split.
        """
        sums, images = results["sums"], self.strategy.batches["train"].count
        losses, seconds = sums["loss"], sums["seconds"]
        test = means(*results["metrics"]["test"])
        row = {
            "epoch": self.epoch,
            "step": self.epoch * self.steps_per_epoch,
            "lr": sums["lr"],
            "train_loss": sum(losses) / len(losses) / images,
            "train_accuracy": sums["right"] / images,
            "stage_loss": [loss / images for loss in losses],
            f"{self.data.unit}_per_second": images / seconds,
            "seconds": seconds,
            "elapsed": sum(row["seconds"] for row in self.metrics) + seconds,
            "activation_bytes": results["activation_bytes"],
            "test_accuracy": test["accuracy"][-1],
            "stage_accuracy": test["accuracy"],
            "stage_kl": test["kl"],
            "certificate": test["certificate"],
        }
        if "val" in results["metrics"]:
            row["val_accuracy"] = means(*results["metrics"]["val"])["accuracy"][-1]
        return row | {"peak_memory_bytes": results["memory"]}

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint if the trainer has a folder. Raises NonFiniteLoss before anything is written."""
        if self.folder is None:
            return
        state = self.strategy.gather_state(self.state_dict())
        if state is not None:
            save_checkpoint(self.folder, state)

    def save_after(self, error: DataError) -> DataError:
        """Save the finished steps if this is the only process; return the error with how to resume the run."""
        if self.folder is None or not self.strategy.is_alone:
            return error
        if self.step:  # otherwise the last checkpoint contains every step
            self.save()
        saved = has_checkpoint(self.folder)
        return DataError(f"{error}; sid train --resume {self.folder} continues it") if saved else error

    def state_dict(self) -> dict:
        """Return this process's part of a checkpoint. Raises NonFiniteLoss if a tensor is infinite or NaN."""
        state = self.strategy.state_dict()
        for name, value in state["network"].items():
            if name in self.finite_names and not value.is_meta and not value.isfinite().all():
                epoch, step = (self.epoch, self.step) if self.step else (self.epoch - 1, self.steps_per_epoch)
                raise self.non_finite(f"{parameter_place(name, value)} is not finite after epoch {epoch}, step {step}")
        random = {"cpu": torch.get_rng_state()}
        if self.strategy.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.strategy.device)
        return state | {
            "config": self.metadata,
            "epoch": self.epoch,
            "step": self.step,
            "random": random,
            "sums": self.sums,
            "metrics": json.dumps([self.metrics, self.strategy.activation_bytes]),
        }

    def resume(self, path: Path | str | None = None) -> None:
        """Load a checkpoint of this run: the file or folder `path`, or None for the last one in the trainer's folder.

        Raises ValueError if it is missing or damaged, or if its settings, data or network differ.
        """
        path = self.folder if path is None else nonempty_path(path, "path")
        if path is None:
            raise ValueError("path must be given for a trainer without a folder")
        with self.strategy.raise_on_one_rank():
            state = self.load_matching(path)
        self.strategy.check_same({name: state[name] for name in ("epoch", "step")})  # a rank may have an older file
        state = self.strategy.local_state(state)
        self.strategy.load_state_dict(state)
        torch.set_rng_state(state["random"]["cpu"])
        if self.strategy.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.strategy.device)
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.metrics, self.strategy.activation_bytes = json.loads(state["metrics"])

    def load_matching(self, path: Path) -> dict:
        """Return the state in a checkpoint. Raises ValueError if its settings, data or network differ."""
        state = load_checkpoint(path)
        settings = [name for name in asdict(self.config) if name not in ("device", "workers", "save_every")]
        check_same(path, state["config"], self.metadata, (*settings, *DATA_FIELDS))
        if difference := compare_shapes(state["network"], self.network.state_dict()):
            raise ValueError(f"{path}: saved by another network ({difference})")
        for name in ("threads", "torch"):
            saved_value, own_value = state["config"].get(name), self.metadata[name]
            if saved_value != own_value and not self.quiet:
                print(f"{name}: {own_value} instead of {saved_value}, so results will not have the same bits")
        if self.strategy.writes_run_folder and self.folder and path.is_file():
            with contextlib.suppress(FileNotFoundError):  # it may be damaged, and must not become the previous one
                if not (last := self.folder / LAST).samefile(path):
                    last.replace(self.folder / REPLACED)
        return state


def parameter_place(name: str, value: Tensor) -> str:
    """Return the name of a non-finite entry of a state dict for an error, for example "body.0.weight of stage 2"."""
    kind, _, rest = name.partition(".")
    number, _, parameter = rest.partition(".")
    if kind != "stages":
        return name
    if number.isdigit():
        return f"{parameter} of stage {int(number) + 1}"
    stage = int(value.flatten(1).isfinite().all(1).int().argmin())  # StackedHeads: the first dimension is the stage
    return f"{rest} of stage {stage + 1}"


def compare_shapes(saved: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """Return the first difference in names or shapes between two state dicts, or None."""
    for name in [*own, *saved]:
        saved_shape, own_shape = (tuple(state[name].shape) if name in state else "nothing" for state in (saved, own))
        if saved_shape != own_shape:
            return f"{name} is {saved_shape} in the checkpoint and {own_shape} in the network"
    return None


@contextlib.contextmanager
def stop_requests(announce: bool = True) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list, so that a run can stop between two steps.

    A SIGINT after another signal raises KeyboardInterrupt. Outside the main thread no signal is collected.
    """
    received: list[int] = []

    def record(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if announce:
            print("stopping after this step, the run is saved ...", file=sys.stderr)

    try:
        previous_handlers = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        previous_handlers = {}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
