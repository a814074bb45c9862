"""Measure on synthetic images what each stage costs, for the simulator, and keep the costs in a JSON file.

SID's step is timed stage by stage, and backpropagation through the plain backbone block by block.
"""

import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_trainer import build_network
from sid_trainer.files import write_atomically
from sid_trainer.methods.common import StepOptions, autocast
from sid_trainer.methods.factory import make_optimizers
from sid_trainer.methods.step import stage_by_stage
from sid_trainer.methods.streams import StageHooks
from sid_trainer.methods.updates import clear_gradients, update
from sid_trainer.network.modules import SIDNetwork, at_least_float32
from sid_trainer.training.config import DTYPES
from sid_trainer.training.cpu import denormals_as_zero
from sid_trainer.training.memory import SavedBytes
from sid_trainer.training.strategy import pick_device

WARM = 2  # warm-up rounds, which are not counted


@dataclass(frozen=True)
class StageCost:
    """What one stage costs one rank, in seconds and bytes per batch, or per microbatch under backpropagation.

    Args:
        forward: Seconds of the forward pass, with the local loss.
        backward: Seconds of the backward pass.
        update: Seconds of the optimizer, once per batch.
        sent: Bytes to the next stage.
        held: Bytes that autograd keeps from the forward to the backward pass.
        backward_input: The part of `backward` for the input's gradient; zero-bubble schedules separate it from the
            weights'. None means half.
        load: Seconds until the batch is loaded, once per batch, for the first stage.
    """

    forward: float
    backward: float
    update: float = 0.0
    sent: int = 0
    held: int = 0
    backward_input: float | None = None
    load: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds of all parts together."""
        return self.load + self.forward + self.backward + self.update

    @property
    def of_input(self) -> float:
        """Return the seconds of the backward pass that give the input's gradient."""
        return self.backward / 2 if self.backward_input is None else min(self.backward_input, self.backward)


@dataclass(frozen=True)
class StepSettings:
    """The network and the training step whose stages are timed, on synthetic images."""

    arch: str = "simple_cnn"
    depth: int | None = None
    batch_size: int = 128
    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 10
    head_depth: int = 1
    hidden_dim: int = 256
    grid: int = 4
    optimizer: str = "adam"
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self):
        for name in ("batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def network(self, plain: bool) -> SIDNetwork:
        """Build the stagewise network, or with `plain` its backbone with one classifier."""
        return build_network(
            self.arch, "stagewise", num_classes=self.num_classes, in_channels=self.in_channels,
            image_size=(self.image_size, self.image_size), depth=self.depth, plain=plain, head_depth=self.head_depth,
            hidden_dim=self.hidden_dim, grid=self.grid,
        )  # fmt: skip


def measure_costs(settings: StepSettings, microbatches: Sequence[int], rounds: int) -> dict[str, list[StageCost]]:
    """Measure the costs by stage: "sid" for a batch, "bp/M" for backpropagation of one of M microbatches.

    The state of the random number generators stays as it was.
    """
    from tqdm import tqdm

    device = pick_device(settings.device)
    with torch.random.fork_rng([]):
        networks = [settings.network(plain).to(device, memory_format=torch.channels_last) for plain in (False, True)]
        shape = (settings.batch_size, settings.in_channels, settings.image_size, settings.image_size)
        inputs = torch.randn(shape).to(device, memory_format=torch.channels_last)
        targets = torch.randint(settings.num_classes, (settings.batch_size,)).to(device)
    options = {"optimizer": settings.optimizer, "dtype": DTYPES[settings.dtype], "rounds": rounds}
    costs = {}
    for m in tqdm([None, *microbatches], desc="measuring", unit=" steps", leave=False, disable=None):
        if m is None:
            costs["sid"] = measure_stages(networks[0], inputs, targets, **options)
        else:
            part = slice(settings.batch_size // m)
            costs[f"bp/{m}"] = measure_blocks(networks[1], inputs[part], targets[part], **options)
    return costs


def measure_stages(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, *, alpha: float = 0.5, optimizer: str = "adam",
    lr: float = 1e-3, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32, rounds: int = 10,
    feed: Iterator[tuple[Tensor, Tensor]] | None = None,
) -> list[StageCost]:  # fmt: skip
    """Measure every stage of a stagewise network in SID's step on inputs (B, ...) and targets (B,).

    The network is not changed. Costs are means over `rounds` steps. If `feed` is given, each step takes its next batch,
    and the time to load it is the first stage's `load`. Raises ValueError for a shared extractor.
    """
    if not isinstance(network.extractor, nn.Identity):
        raise ValueError("network must be stagewise: the stages of a shared extractor cannot be owned by ranks")
    with measured_copy(network, inputs.device, rounds) as network:
        optimizers = make_optimizers(network, "sid", optimizer=optimizer, lr=lr, weight_decay=weight_decay)
        timer = StageStopwatch(inputs.device, len(network.stages))
        for _ in range(WARM + rounds):
            for stopwatch, stage_optimizer in zip(timer.stages, optimizers[1:], strict=True):
                stopwatch.start_round()
                stopwatch.time("update", clear_gradients, [stage_optimizer])
            batch = (inputs, targets) if feed is None else timer.stages[0].time("load", next, feed)
            stage_by_stage(network, *batch, StepOptions(alpha, dtype=dtype), optimizers, hooks=timer)
        features, prior, costs = inputs, network.uniform(inputs).float(), []
        for i, stage in enumerate(network.stages):
            with SavedBytes(stage.parameters()) as saved, autocast(inputs, dtype):
                outputs, logits = stage(features, prior)
            features, prior = outputs.detach(), at_least_float32(logits.detach()).softmax(dim=1)
            sent = features.nbytes + prior.nbytes
            costs.append(StageCost(**timer.stages[i].means(), sent=sent, held=saved.peak))
    return costs


@contextmanager
def measured_copy(network: SIDNetwork, device: torch.device, rounds: int):
    """Yield a copy of the network to train, and restore the state of the random number generators afterwards."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    with denormals_as_zero(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield copy.deepcopy(network).train()


def measure_blocks(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, *, optimizer: str = "adam", lr: float = 1e-3,
    weight_decay: float = 0.0, dtype: torch.dtype = torch.float32, rounds: int = 10,
) -> list[StageCost]:  # fmt: skip
    """Measure every block of a plain backbone under backpropagation; the classifier is part of the last block.

    network: from `build_network(layout="stagewise", plain=True)`; it is not changed. inputs (B, ...) and targets (B,)
    are one microbatch. Costs are means over `rounds` steps. The input of the first block needs no gradient.
    """
    if not (isinstance(network.extractor, nn.Sequential) and len(network.stages) == 1):
        raise ValueError("network must be a plain backbone: blocks in a row and one classifier")
    with measured_copy(network, inputs.device, rounds) as network:
        head = network.stages[0].head
        blocks = [*network.extractor[:-1], nn.Sequential(network.extractor[-1], Classifier(head, network.num_classes))]
        settings = {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
        optimizers = [make_optimizers(SIDNetwork(block, [], network.num_classes), "bp", **settings) for block in blocks]

        def forward(block: nn.Module, features: Tensor) -> Tensor:
            with autocast(inputs, dtype):
                outputs = block(features)
            return F.cross_entropy(at_least_float32(outputs), targets) if block is blocks[-1] else outputs

        clocks = [Stopwatch(inputs.device) for _ in blocks]
        block_inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for _ in range(WARM + rounds):
            features, block_inputs, outputs = inputs, [], []
            for i, block in enumerate(blocks):
                clocks[i].start_round()
                clocks[i].time("update", clear_gradients, optimizers[i])
                block_inputs.append(features.detach().requires_grad_(i > 0))
                features = clocks[i].time("forward", forward, block, block_inputs[i])
                outputs.append(features)
            gradient = None
            for i in reversed(range(len(blocks))):
                if i > 0:
                    clocks[i].time("backward_input", torch.autograd.grad, outputs[i], block_inputs[i], gradient, True)
                clocks[i].time("backward", outputs[i].backward, gradient)
                gradient, outputs[i] = block_inputs[i].grad, outputs[i].detach()
                clocks[i].time("update", update, optimizers[i])
        costs = []
        for i, block in enumerate(blocks):
            with SavedBytes(block.parameters()) as saved:
                forward(block, block_inputs[i])
            sent = 0 if i == len(blocks) - 1 else outputs[i].nbytes
            costs.append(StageCost(**{"backward_input": 0.0} | clocks[i].means(), sent=sent, held=saved.peak))
    return costs


class Classifier(nn.Module):
    """A module that calls a head with the features and a prior of zeros, for heads that ignore their prior."""

    def __init__(self, head: nn.Module, num_classes: int):
        super().__init__()
        self.head, self.num_classes = head, num_classes

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features, features.new_zeros(len(features), self.num_classes))


class Stopwatch:
    """Measure the seconds of the named parts of each round. Waits for the GPU before it reads the clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rounds: list[dict[str, float]] = []

    def start_round(self) -> None:
        """Start a round, whose parts are 0 seconds so far."""
        self.rounds.append(defaultdict(float))

    def now(self) -> float:
        """Wait for the GPU, if there is one, and return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, part: str, call: Callable, *arguments):
        """Make a call, add its seconds to a part of the round, and return its result."""
        start = self.now()
        result = call(*arguments)
        self.add(part, start)
        return result

    def add(self, part: str, start: float) -> float:
        """Add the seconds since `start` to a part, and return the time now."""
        now = self.now()
        self.rounds[-1][part] += now - start
        return now

    def means(self) -> dict[str, float]:
        """Return the mean seconds of each part without the first WARM rounds. A median would hide rare slow rounds,
        which an epoch has too."""
        counted = self.rounds[WARM:]
        return {part: statistics.fmean(parts[part] for parts in counted) for part in counted[0]}


class StageStopwatch(StageHooks):
    """Time the forward pass, backward pass and update of each stage, as hooks of a step."""

    def __init__(self, device: torch.device, stages: int):
        super().__init__()
        self.stages = [Stopwatch(device) for _ in range(stages)]

    @contextmanager
    def run_stage(self, i: int):
        self.current, self.last = self.stages[i], self.stages[i].now()
        yield

    def outputs_ready(self, features: Tensor, belief: Tensor) -> None:
        self.last = self.current.add("forward", self.last)

    def update(self, update_stage: Callable[[], None]) -> None:
        self.current.add("backward", self.last)
        self.current.time("update", update_stage)


# ---------------------------------------------------------------- files


def load_or_measure(
    settings: StepSettings, microbatches: Sequence[int], file: Path | None, rounds: int
) -> dict[str, list[StageCost]]:
    """Read the costs from `file`; if it does not exist, measure them and write it.

    Raises ValueError if the file has another format, was measured with other settings, or lacks some of the costs.
    """
    if file is None or not file.exists():
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: no such folder")
        costs = measure_costs(settings, microbatches, rounds)
        if file is not None:
            record = {"of": asdict(settings), "torch": str(torch.__version__), "threads": torch.get_num_threads()}
            if (device := pick_device(settings.device)).type == "cuda":
                record["gpu"] = torch.cuda.get_device_name(device)
            filed = {name: [asdict(cost) for cost in stages] for name, stages in costs.items()}
            write_json(file, record | {"costs": filed})
        return costs
    text = file.read_text()
    try:
        record = json.loads(text)
        measured = record["of"]
        costs = {name: [StageCost(**cost) for cost in stages] for name, stages in record["costs"].items()}
        numbers = [value for stages in costs.values() for cost in stages for value in asdict(cost).values()]
        if not all(value is None or value >= 0 for value in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not what `simulate.py --costs` writes") from error
    requested = asdict(settings)
    for name in requested.keys() - {"device"}:
        if measured.get(name) != requested[name]:
            raise ValueError(
                f"{file}: was measured with {name} {measured.get(name)}, not {requested[name]}: choose another file"
            )
    for name in ["sid", *(f"bp/{m}" for m in microbatches)]:
        if name not in costs:
            raise ValueError(f"{file}: holds no costs for {name}, only for {', '.join(costs)}: choose another file")
    return costs


def write_json(file: Path, record: dict) -> None:
    """Write a record as JSON atomically."""
    write_atomically(file, lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))
