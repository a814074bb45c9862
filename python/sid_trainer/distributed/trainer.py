"""A trainer that is one of many processes: replicas share every batch, ranks of the pipeline share the stages.

The run's folder is that of one process: the same checkpoints, readable whatever number of processes goes on with them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batches import Labels
from ..files import write_atomically
from ..methods.common import StepResult, autocast, clear_gradients
from ..methods.factory import BACKPROPAGATED, LOCAL, make_step
from ..methods.step import stage_by_stage
from ..methods.streams import StageHooks, stage_streams
from ..network.modules import SIDNetwork, at_least_float32
from ..training.checkpoint import save_checkpoint
from ..training.config import TrainConfig
from ..training.evaluation import judged
from ..training.trainer import Interrupted, Trainer
from .pipeline import Layout, Link, layouts
from .rendezvous import Place, Reports, agree, refuse, said_once, watching
from .replicas import Replicas, load_network, load_optimizer, whole
from .state import PIPELINE, by_replica, found_together, part_of, shares, states_together

SHOWN = 40  # batches of an epoch whose times are kept for the picture


class ParallelTrainer(Trainer):
    """`Trainer` on the stages and the share of each batch that `place` gives to this process.

    parts: the stages of each rank of the pipeline; None where it has one rank. in_flight: see `Link`. The other
    arguments are `Trainer`'s.
    """

    def __init__(
        self, network: SIDNetwork, data, config: TrainConfig, folder=None, *, place: Place,
        parts: Sequence[range] | None = None, in_flight: int = 2, sharded: bool = False,
        about: dict | None = None, quiet: bool = False,
    ):  # fmt: skip
        self.place, self.sharded = place, sharded and place.replicas > 1
        self.parts = [range(len(network.stages))] if parts is None else list(parts)
        self.between: list[Layout] = []  # of what each stage hands on to another rank
        super().__init__(network, data, config, folder, about=about, quiet=quiet or not place.records)
        self.own = self.parts[place.stage]
        self.records, self.hears, self.reports = place.records, place.first, Reports(place)
        self.rows: dict[str, list[int]] = {}  # of this process in the batches of each split
        self.whole_rows = self.batches["train"].sizes()
        self.share_out()
        self.link = self.make_link(in_flight)
        self.replicas = Replicas(place, self.device)
        self.wrapped = self.in_replicas() if place.replicas > 1 else self.network
        if self.sharded:  # the parameters are other ones now
            self.make_optimizers()
        if place.stages == 1:
            on_streams = config.streams and self.device.type == "cuda"
            hooks = stage_streams(self.device, len(self.own)) if on_streams else StageHooks(place.replicas > 1)
            self.run_step = make_step(config.method, self.wrapped, self.optimizers, self.options, hooks)
        else:
            self.part = SIDNetwork(nn.Identity(), [self.wrapped.stages[i] for i in self.own], network.num_classes)
            self.run_step = self.pipeline_step

    # ---------------------------------------------------------------- what is this process's

    def share_out(self) -> None:
        share = (self.place.replica, self.place.replicas)
        for name, batches in self.batches.items():
            split = {"train": self.data.train, "test": self.data.test, "val": self.data.validation}[name]
            self.rows[name] = [len(range(share[0], rows, share[1])) for rows in batches.sizes()]
            parts = BACKPROPAGATED.get(self.config.method, {}).get("parts", 0) if name == "train" else 0
            least = max(1, 2 * parts) * share[1]  # so that all learn from equally many parts: each is a reduction
            if min(batches.sizes()) < least:
                refuse(
                    self.place, f"batch_size {self.config.batch_size} leaves a {name} batch of {min(batches.sizes())}"
                    f" images: the {share[1]} processes that share it need {least}"
                )  # fmt: skip
            if self.place.first:
                batches.share = share
            else:
                self.batches[name] = Labels(split, self.config.batch_size, self.device, share)

    def placed(self, network: SIDNetwork) -> SIDNetwork:
        """Only what is this process's goes to its device; other ranks' stages keep names and shapes, and no memory."""
        if self.sharded:
            return network  # `Replicas.shard` takes it there, in shards
        if self.place.stages == 1:
            return super().placed(network)
        network.to(memory_format=self.memory_format)
        height, width = self.data.image_size
        example = torch.zeros(2, height, width, self.data.in_channels, device=self.device).permute(0, 3, 1, 2)
        self.between = layouts(network, example.contiguous(memory_format=self.memory_format), self.dtype)
        for i, stage in enumerate(network.stages):
            stage.to(self.device if i in self.parts[self.place.stage] else "meta")
        network.extractor.to(self.device if self.place.first else "meta")
        return network

    def make_link(self, in_flight: int) -> Link:
        received = None if self.place.first else self.between[self.own.start - 1]
        sent = None if self.place.last else self.between[self.own.stop - 1]
        return Link(self.place, len(self.own), self.network.num_classes, received, sent, in_flight)

    def in_replicas(self) -> SIDNetwork:
        if not self.sharded:
            return self.replicas.wrap(self.network, self.optimizers)
        # shards' gradients are weighed at the logits: that is enough where none passes from stage to stage
        if self.config.method not in LOCAL and any(rows % self.place.replicas for rows in self.whole_rows):
            refuse(self.place, f"method {self.config.method!r} with parallel 'shard' needs batches that"
                   f" {self.place.replicas} processes share evenly; batches here are of"
                   f" {' and '.join(map(str, sorted(set(self.whole_rows))))} images")  # fmt: skip
        self.replicas.shard(self.network)
        return self.network

    # ---------------------------------------------------------------- steps

    def train_epoch(self) -> None:
        self.link.forget()
        self.replicas.waited = 0.0
        rows = self.rows["train"][self.step :]
        self.link.expect(rows)
        begun, self.times = time.time(), []
        super().train_epoch()
        ended, link = time.time(), self.link
        # All that is not waiting is work, loading and saving too; so is what a backward waits for in other replicas.
        busy = ended - begun - link.receiving - link.sending - self.replicas.waited
        self.spent = {
            "begun": begun, "ended": ended, "busy": busy, "receiving": link.receiving, "sending": link.sending,
            "reducing": self.replicas.waited, "bytes_sent": link.bytes_sent, "trained": len(rows),
            "batches": self.times,
        }  # fmt: skip

    def one_step(self, inputs: Tensor | None, targets: Tensor) -> StepResult:
        if self.place.first:
            self.link.stop = self.asked_to_stop()
        else:
            features, self.prior = self.link.take()
            inputs = features
        start = time.time()
        self.replicas.share = len(targets) / self.whole_rows[self.step]
        with watching(self.place, "another rank"):
            result = super().one_step(inputs, targets)
        if len(self.times) < SHOWN:
            self.times.append((start, time.time()))
        return result

    def pipeline_step(self, inputs: Tensor, targets: Tensor) -> StepResult:
        optimizers = [None, *(self.optimizers[1 + i] for i in self.own)]
        prior = self.part.uniform(inputs) if self.place.first else self.prior
        options = replace(self.options, alpha=[self.alphas[i] for i in self.own])
        clear_gradients(optimizers)
        losses, logits = stage_by_stage(self.part, inputs, targets, options, optimizers, hooks=self.link, prior=prior)
        return StepResult(losses, logits)

    def asked_to_stop(self) -> bool:
        """Whether a signal reached the first rank of any replica: all end after the same step. Later ranks, whose own
        signals are not heard, learn of it with the batch."""
        asked = torch.tensor([float(bool(self.stop))])
        if self.place.replicas > 1:
            with watching(self.place, "another rank"):
                dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.place.data)
        return bool(asked)

    def stopping(self) -> bool:
        return self.link.stop

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[Tensor, int]]:
        """The same for the stages and images of this process; ranks of the pipeline go on as batches arrive."""
        self.alike()
        if self.place.stages == 1:
            return super().evaluate()
        self.network.eval()
        found = {}
        for name in [name for name in self.batches if name != "train"]:
            self.link.expect(self.rows[name])
            sums, count = 0, 0
            for inputs, targets in self.batches[name].in_order():
                if self.place.first:
                    features, prior = inputs, self.part.uniform(inputs)
                else:
                    features, prior = self.link.take()
                first, every = prior, []
                with autocast(features, self.dtype):
                    for stage in self.part.stages:
                        features, logits = stage(features, prior)
                        prior = at_least_float32(logits).softmax(dim=1)
                        every.append(logits)
                self.link.send(features, prior)
                alphas = [self.alphas[i] for i in self.own]
                options = self.judging["divergence"], self.judging["label_smoothing"]
                sums, count = sums + judged(every, first, targets, alphas, *options), count + len(targets)
            found[name] = (sums.cpu(), count)
        return found

    def alike(self) -> None:
        """Buffers (batch-norm's statistics, each replica's of its own images) become the first replica's everywhere."""
        if self.place.replicas > 1:
            for buffer in self.network.buffers():
                if not buffer.is_meta:
                    dist.broadcast(buffer, self.place.stage, group=self.place.data)

    # ---------------------------------------------------------------- what all processes found, put together

    def row(self, found: dict) -> dict | None:
        about = {"rank": self.place.rank, "stages": [i + 1 for i in self.own], **self.spent}
        about["peak_memory_bytes"] = found["peak"]
        every = self.reports.gather(found | {"about": about, "activation_bytes": self.activation_bytes})
        if every is None:
            return None
        self.activation_bytes = max(found["activation_bytes"] for found in every)
        row = super().row(found_together(by_replica(every, self.place.stages)))
        ranks = [found["about"] for found in every]
        pipeline = shares(ranks, self.place.stages)
        if self.folder:
            text = json.dumps(pipeline)
            write_atomically(self.folder / PIPELINE, lambda file: file.write(text.encode()))
        for rank in pipeline["ranks"]:
            del rank["batches"]  # the picture's; a row of numbers is enough
        return row | {"pipeline": pipeline}

    def save(self) -> None:
        """The recorder writes what all ranks know; the others go on as soon as they have told it."""
        if not self.folder:
            return
        self.alike()
        own = super().state()
        own["names"] = list(own["network"])
        own["network"] = {name: t for name, t in own["network"].items() if not t.is_meta}
        told = (
            ("network", "optimizers", "schedulers", "sums") if self.place.replica == 0 else ("sums",)
        )  # all are alike
        parts = {name: own[name] for name in told}
        every = self.reports.gather(parts | {"activation_bytes": self.activation_bytes})
        if every is None:
            return
        save_checkpoint(self.folder, states_together(own, by_replica(every, self.place.stages)))

    def whole(self, state: Any) -> Any:
        return whole(state) if self.sharded else state

    def load(self, state: dict) -> None:
        if not self.sharded:
            return super().load(state)
        load_network(self.network, state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer:
                load_optimizer(optimizer, saved)

    def found(self, place: Path | str | None = None) -> dict:
        with said_once(self.place):
            state = super().found(place)
        agree(self.place, {name: state[name] for name in ("epoch", "step")})  # one may have an older copy of the folder
        return state

    def adopt(self, state: dict) -> None:
        """A rank takes its own stages out of a checkpoint, and what was summed to where it will be summed again."""
        if self.place.stages > 1:
            state = part_of(state, self.network.state_dict(), self.optimizers, self.own)
        if self.place.replica > 0 and state["sums"]:
            none = [0.0] * len(state["sums"]["loss"])
            state = state | {"sums": state["sums"] | {"loss": none, "right": 0}}
        super().adopt(state)

    def fit(self) -> list[dict]:
        agree(self.place, {name: self.about[name] for name in ("train_images", "pixel_mean", "classes")})
        with watching(self.place, "another rank"):
            try:
                metrics = super().fit()
            except Interrupted:
                self.hand_over()
                if not self.records:
                    raise SystemExit(130) from None  # the recorder says it
                raise
            self.hand_over()
        return metrics

    def hand_over(self) -> None:
        """Wait until the others have what was sent: with this process its messages would be gone."""
        self.link.wait_for_room()
        self.reports.finish()
