"""The training loop around a step: epochs, evaluation of every stage, the run's folder. It holds no algorithm."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from .data import Batches, ImageData, pixel_statistics
from .files import write_atomically
from .network import SIDNetwork, at_least_float32
from .stacked import stacked_stages
from .step import STEPS, autocast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    method: str = "sid"  # one of step.STEPS
    epochs: int = 5
    batch_size: int = 128
    lr: float = 1e-3
    alpha: float = 0.5
    seed: int = 0  # of the order, crops and flips; the network is drawn before it comes here
    dtype: str = "float32"
    device: str = "auto"
    channels_last: bool = True

    def __post_init__(self):
        for name, table in (("method", STEPS), ("dtype", DTYPES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, not {getattr(self, name)!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


class NonFiniteLoss(RuntimeError):
    """A stage's loss became infinite or NaN; the message names stage, epoch, step and learning rate."""


class Interrupted(Exception):
    """The run was asked to stop, between two steps, and has been saved."""


def make_optimizers(network: SIDNetwork, lr: float, method: str = "sid") -> list[Optimizer]:
    """The reference's: one Adam for the extractor and one a stage, in the order the steps take them.

    For `sid` with equal stages one Adam has all stages' parameters, stacked: the same numbers in one update. Fused,
    because many optimizers of 4 small tensors are all overhead: 11 took 2.0 ms a step in place of 3.7 on 2 CPU cores.
    """
    stacked = stacked_stages(network) if method == "sid" else None
    stages = [stage.parameters() for stage in network.stages] if stacked is None else [stacked.parameters()]
    return [Adam(parameters, lr=lr, fused=True) for parameters in (network.extractor.parameters(), *stages)]


class Trainer:
    """Trains `network` on `data`; with a folder, also writes config.json, metrics.jsonl and last.pt into it.

    `metrics` holds one dict an epoch, the lines of metrics.jsonl.
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
        self.about = {**asdict(config), **(about or {}), "torch": torch.__version__}
        self.device = pick_device(config.device)
        self.dtype = DTYPES[config.dtype]
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network = network.to(self.device, memory_format=layout)
        self.optimizers = make_optimizers(self.network, config.lr, config.method)
        self.generator = torch.Generator().manual_seed(config.seed)
        statistics = pixel_statistics(data.train.images)
        self.train_batches = Batches(data.train, config.batch_size, self.device, *statistics)
        self.test_batches = Batches(data.test, config.batch_size, self.device, *statistics)
        self.epoch = self.step = 0
        self.metrics: list[dict] = []

    def fit(self) -> list[dict]:
        """Train all epochs. Raises NonFiniteLoss, and Interrupted when SIGINT or SIGTERM asked for an end."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.about, indent=2, default=str)
            write_atomically(self.folder / "config.json", lambda file: file.write(text.encode()))
            (self.folder / "metrics.jsonl").write_text("")
        with stop_requests() as stop:
            for epoch in range(1, self.config.epochs + 1):
                self.epoch = epoch
                row = {"epoch": self.epoch, **self.train_epoch(stop), **self.evaluate()}
                self.metrics.append(row)
                self.report(row)
                self.save()
        return self.metrics

    def train_epoch(self, stop: list[int]) -> dict:
        """Every training image once. Losses are means over images, `train_loss` also over stages; the accuracy is the
        last stage's, on cropped and flipped images, before each update."""
        from tqdm import tqdm

        self.network.train()
        run_step, config = STEPS[self.config.method], self.config
        check_every = 1 if self.device.type == "cpu" else 20  # steps; elsewhere to look at a loss waits for the device
        batches = self.train_batches.shuffled(self.generator, self.data.crop, self.data.flip)
        bar = tqdm(
            total=len(self.data.train.labels), desc=f"epoch {self.epoch}/{config.epochs}", unit=" images", leave=False,
            disable=True if self.quiet else None,
        )  # fmt: skip
        sums, pending, seen = torch.zeros(1, dtype=torch.float64), [], 0
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        start = time.perf_counter()
        with bar:
            for self.step, (inputs, targets) in enumerate(batches, 1):
                if not config.channels_last:
                    inputs = inputs.contiguous()
                result = run_step(self.network, inputs, targets, config.alpha, self.optimizers, dtype=self.dtype)
                pending.append(result.stage_loss * len(targets))
                right += (result.logits.argmax(dim=1) == targets).sum()
                if self.step % check_every == 0 or self.step == len(self.train_batches) or stop:
                    losses = self.finite(torch.stack(pending))  # (steps, L)
                    sums, pending = sums + losses.sum(dim=0), []
                    done = min(self.step * config.batch_size, len(self.data.train.labels))
                    bar.set_postfix_str(f"loss {sums.mean() / done:.4f}", refresh=False)
                    bar.update(done - seen)
                    seen = done
                if stop:
                    self.save()
                    raise Interrupted(f"stopped in epoch {self.epoch} after step {self.step}")
        seconds = time.perf_counter() - start
        return {
            "train_loss": (sums.mean() / seen).item(),
            "train_accuracy": right.item() / seen,
            "stage_loss": (sums / seen).tolist(),
            "images_per_second": seen / seconds,
            "seconds": seconds,
        }

    def finite(self, losses: Tensor) -> Tensor:
        """The last steps' losses (steps, L) in float64 on the CPU, if they are all finite."""
        losses = losses.double().cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            row, stage = bad[0].tolist()
            step = self.step - len(losses) + 1 + row
            stage = len(self.network.stages) if losses.shape[1] == 1 else stage + 1
            saved = f"last.pt is of epoch {self.epoch - 1}" if self.epoch > 1 else "nothing was saved yet"
            raise NonFiniteLoss(
                f"the loss of stage {stage} is {losses[tuple(bad[0])].item()} in epoch {self.epoch}, step {step}"
                f" (learning rate {self.config.lr:g}, {self.config.dtype}); {saved}"
            )
        return losses

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Accuracy of every stage's belief p_i on the test split, and the mean of KL(y || p_i) = -log p_i[y]."""
        self.network.eval()
        depth, count = len(self.network.stages), len(self.data.test.labels)
        right, divergence = torch.zeros(2, depth, dtype=torch.float64, device=self.device)
        for inputs, targets in self.test_batches.in_order():
            if not self.config.channels_last:
                inputs = inputs.contiguous()
            with autocast(inputs, self.dtype):
                logits = torch.stack(self.network.stage_logits(inputs))  # (L, B, C)
            right += (logits.argmax(dim=2) == targets).sum(dim=1)
            every = targets.expand(depth, -1)  # (L, B)
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), every.flatten(), reduction="none")
            divergence += loss.view(depth, -1).double().sum(dim=1)
        accuracy = (right / count).tolist()
        return {
            "test_accuracy": accuracy[-1],
            "stage_accuracy": accuracy,
            "stage_kl": (divergence / count).tolist(),
        }

    def report(self, row: dict) -> None:
        """Append the epoch's line to metrics.jsonl and print it as a row of the table."""
        if self.folder:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.quiet:
            return
        if row["epoch"] == 1:
            print("epoch   train loss   first stage   last stage   KL(y|p_L)   images/s   seconds")
        print(
            f"{row['epoch']:5d} {row['train_loss']:12.4f} {row['stage_accuracy'][0]:13.2%} {row['test_accuracy']:12.2%}"
            f" {row['stage_kl'][-1]:11.4f} {row['images_per_second']:10.0f} {row['seconds']:9.1f}",
            flush=True,
        )

    def save(self) -> None:
        """Write last.pt: plain tensors and numbers, for torch.load(..., weights_only=True)."""
        if not self.folder:
            return
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "config": json.loads(json.dumps(self.about, default=str)),
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }
        write_atomically(self.folder / "last.pt", lambda file: torch.save(state, file))


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
def stop_requests() -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM only add to the yielded list, so that a run ends between two steps.

    A second SIGINT is an ordinary KeyboardInterrupt. Outside the main thread signals stay as they are.
    """
    received: list[int] = []

    def note(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
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
