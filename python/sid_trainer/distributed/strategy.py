"""Strategies that share a trainer's work: replicas share every batch, and the ranks of a pipeline share the stages.

The run's folder is the same as that of one process: any number of processes may resume from its checkpoints.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sid_kernels.belief_head.problem import PriorHead

from ..data.batches import Batches, Labels
from ..data.own import OwnData
from ..data.text import TextBatches, TextData
from ..methods.common import StepResult, autocast
from ..methods.factory import BACKPROPAGATED, LOCAL, make_step
from ..methods.readouts import train_readouts, trains_in_chunks, windows_at_once
from ..methods.step import stage_by_stage
from ..methods.streams import StageHooks
from ..methods.updates import clear_gradients
from ..network.language import LanguageModel, SharedReadout
from ..network.modules import SIDNetwork, at_least_float32
from ..training.strategy import Strategy
from ..training.trainer import Interrupted
from .pipeline import StageLink, activation_layouts
from .rendezvous import Communicator
from .replicas import Replicas, full_tensors, shard_state
from .state import combine_results, combine_states, local_state, summarize_times

TIMED_BATCHES = 40  # batches of an epoch whose times are kept for the report


class DataStrategy(Strategy):
    """Share every batch among replicas of the network, whose gradients are averaged."""

    network: SIDNetwork  # networks cut by names are for one process
    is_alone = False

    def __init__(self, communicator: Communicator):
        self.communicator, self.topology = communicator, communicator.topology
        self.writes_run_folder, self.handles_signals = communicator.is_logging, self.topology.is_first
        self.stop = False  # whether the run ends after the current step; all replicas agree
        self.batch_times: list[tuple[float, float]] = []

    # ---------------------------------------------------------------- setup

    def make_batches(self, name: str, split: Any) -> Batches | TextBatches:
        text = isinstance(self.data, TextData)
        if isinstance(self.data, OwnData) and not text:
            self.communicator.abort_all(
                "data must be images or a text for several processes; other data need your own loop"
            )
        size, first = self.config.batch_size, self.topology.is_first
        # Later ranks of a pipeline need only the labels of images; those of a text are read with its tokens.
        batches = super().make_batches(name, split) if first or text else Labels(split, size, self.device)
        assert isinstance(batches, (Batches, TextBatches))  # for type checkers
        method, replicas = self.config.method, self.topology.replicas
        parts = BACKPROPAGATED.get(method, {}).get("parts", 0) if name == "train" else 0
        needed = max(1, 2 * parts) * replicas  # each part ends in a reduction, in which all replicas take part
        if (smallest := min(batches.sizes()) // batches.context) < needed:
            self.communicator.abort_all(
                f"batch_size {size} leaves a {name} batch of {smallest} {'windows' if text else 'images'},"
                f" but the {replicas} processes that share it need at least {needed}"
            )
        batches.share = self.topology.share
        return batches

    def check_smallest_batch(self, images: int) -> None:
        share = images // self.topology.replicas  # the same on all ranks
        if share == 1:
            with self.raise_on_one_rank():
                super().check_smallest_batch(share)

    def place_network(self) -> None:
        super().place_network()
        self.replicas = Replicas(self.topology, self.communicator.replica_group, self.device)

    def make_step(self) -> Any:
        replicated = self.replicas.wrap(self.network, self.optimizers) if self.topology.replicas > 1 else self.network
        return make_step(self.config.method, replicated, self.optimizers, self.options, self.make_hooks())

    def make_hooks(self) -> StageHooks:
        on_gpu = self.device.type == "cuda" and self.config.streams
        return super().make_hooks() if on_gpu else StageHooks(defer_updates=self.topology.replicas > 1)

    # ---------------------------------------------------------------- an epoch

    @contextmanager
    def running(self) -> Iterator[None]:
        """Exit only after other processes have received what this one sent: the rest is lost when a process ends."""
        with self.communicator.watch():
            try:
                yield
            except Interrupted:
                self.wait_for_sends()
                if not self.writes_run_folder:
                    raise SystemExit(130) from None  # the logging rank prints it
                raise
            self.wait_for_sends()

    def wait_for_sends(self) -> None:
        self.communicator.wait_for_sends()

    def train_batches(self, epoch: int, first_step: int) -> Generator[tuple[Any, Tensor]]:
        start = time.time()
        self.replicas.wait_seconds, self.batch_times = 0.0, []
        self.rows = iter(self.batches["train"].sizes()[first_step:])
        yield from super().train_batches(epoch, first_step)
        end, link, reducing = time.time(), self.link_usage(), self.replicas.wait_seconds
        self.times = {
            "rank": self.topology.rank,
            "stages": [i + 1 for i in self.local_stages],
            "begun": start,
            "ended": end,
            # All time except waiting counts as busy, also loading, saving, and the waiting inside a backward pass.
            "busy": end - start - link["receiving"] - link["sending"] - reducing,
            "reducing": reducing,
            **link,
            "trained": len(self.batches["train"]) - first_step,
            "batches": self.batch_times,
        }

    def link_usage(self) -> dict[str, float]:
        """Return the seconds of waiting for neighbors in the pipeline, and the bytes sent, in the current epoch."""
        return {"receiving": 0.0, "sending": 0.0, "bytes_sent": 0}

    def run_step(self, inputs: Any, targets: Tensor) -> StepResult:
        inputs = self.recv_inputs(inputs)
        start = time.time()
        self.replicas.share = len(targets) / next(self.rows)
        with self.communicator.watch():
            result = super().run_step(inputs, targets)
        if len(self.batch_times) < TIMED_BATCHES:
            self.batch_times.append((start, time.time()))
        return result

    def recv_inputs(self, inputs: Any) -> Any:
        """Return the inputs of the next step after all replicas have agreed whether it is the last one."""
        requested = torch.tensor([float(bool(self.stop_signals))])
        if self.topology.replicas > 1:
            with self.communicator.watch():
                dist.all_reduce(requested, dist.ReduceOp.MAX, group=self.communicator.replica_group)
        self.stop = bool(requested)
        return inputs

    def should_stop(self) -> bool:
        return self.stop

    def evaluate(self) -> dict[str, tuple[Tensor, int]]:
        self.sync_buffers()
        return super().evaluate()

    def sync_buffers(self) -> None:
        """Copy the first replica's buffers to all: each has batch-norm statistics of its own images."""
        if self.topology.replicas > 1:
            for buffer in self.network.buffers():
                if not buffer.is_meta:
                    dist.broadcast(buffer, self.topology.stage_rank, group=self.communicator.replica_group)

    # ---------------------------------------------------------------- results and checkpoints

    def gather_epoch(self, results: dict) -> dict | None:
        times = self.times | {"peak_memory_bytes": results["memory"]}
        rank_results = self.communicator.gather_on_logging_rank(results | {"times": times})
        if rank_results is None:
            return None
        self.activation_bytes = max(one["activation_bytes"] for one in rank_results)
        pipeline = summarize_times([one["times"] for one in rank_results], self.topology.stage_ranks)
        return combine_results(rank_results, self.topology.stage_ranks) | {"pipeline": pipeline}

    def gather_state(self, state: dict) -> dict | None:
        names = ("network", "optimizers", "schedulers", "sums")  # the other replicas hold the same
        part = {name: state[name] for name in (names if self.topology.replica == 0 else ("sums",))}
        if "network" in part:
            part["network"] = {name: tensor for name, tensor in state["network"].items() if not tensor.is_meta}
        rank_states = self.communicator.gather_on_logging_rank(part | {"activation_bytes": self.activation_bytes})
        return None if rank_states is None else combine_states(state, rank_states, self.topology.stage_ranks)

    def state_dict(self) -> dict:
        self.sync_buffers()
        return super().state_dict()

    def local_state(self, state: dict) -> dict:
        if self.topology.replica > 0 and state["sums"]:  # each replica adds up its own images
            empty = {"loss": [0.0] * len(state["sums"]["loss"]), "right": 0}
            state = state | {"sums": state["sums"] | empty}
        return state

    def raise_on_one_rank(self) -> AbstractContextManager[None]:
        return self.communicator.raise_on_one_rank()

    def check_same(self, values: dict) -> None:
        self.communicator.check_same(values)


class ShardStrategy(DataStrategy):
    """Share every batch among replicas that also share the parameters: each holds a shard of every stage."""

    def place_network(self) -> None:
        self.replicas = Replicas(self.topology, self.communicator.replica_group, self.device)
        # Gradients are weighted at each stage's logits. That suffices if no gradient passes from stage to stage.
        sizes = set(self.batches["train"].sizes())
        if self.config.method not in LOCAL and any(size % self.topology.replicas for size in sizes):
            self.communicator.abort_all(
                f"method {self.config.method!r} with parallel 'shard' needs batches that {self.topology.replicas}"
                f" processes share evenly, not batches of {' and '.join(map(str, sorted(sizes)))} images"
            )
        self.replicas.shard(self.network)

    def make_step(self) -> Any:
        return make_step(self.config.method, self.network, self.optimizers, self.options, self.make_hooks())

    def state_dict(self) -> dict:
        return full_tensors(super().state_dict())

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(shard_state(state, self.network, self.optimizers))


class StageStrategy(DataStrategy):
    """Run a pipeline of stages, in one or more replicas.

    Args:
        stages_by_rank: The stages of each rank of a pipeline, counted from 0.
        in_flight: As in `StageLink`.
    """

    def __init__(self, communicator: Communicator, stages_by_rank: Sequence[range], in_flight: int = 2):
        super().__init__(communicator)
        self.stages_by_rank, self.in_flight = stages_by_rank, in_flight
        self.prior: Tensor | PriorHead | None = None

    def assign_stages(self) -> range:
        if not isinstance(self.network.extractor, nn.Identity):
            raise ValueError("network must be stagewise: a shared extractor needs the gradients of all stages")
        return self.stages_by_rank[self.topology.stage_rank]

    def place_network(self) -> None:
        """Move this rank's stages to its device; the others keep only names and shapes, on the meta device."""
        self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # missing from the stubs
        if isinstance(self.data, TextData):
            example = torch.zeros(2, *self.data.image_size, dtype=torch.int64, device=self.device)
        else:
            height, width = self.data.image_size
            example = torch.zeros(2, height, width, self.data.in_channels, device=self.device).permute(0, 3, 1, 2)
            example = example.contiguous(memory_format=self.memory_format)
        layouts = activation_layouts(self.network, example, self.options.dtype)
        for i, stage in enumerate(self.network.local_modules[1:]):
            stage.to(self.device if i in self.local_stages else "meta")
        self.replicas = Replicas(self.topology, self.communicator.replica_group, self.device)
        received = None if self.topology.is_first else layouts[self.local_stages.start - 1]
        sent = None if self.topology.is_last else layouts[self.local_stages.stop - 1]
        self.link = StageLink(
            self.communicator, len(self.local_stages), self.network.num_classes, received, sent, self.in_flight,
            self.batches["train"].context,
        )  # fmt: skip

    def make_step(self) -> Any:
        network, optimizers = self.network, [None, *(self.optimizers[1 + i] for i in self.local_stages)]
        stages = network.local_modules[1:]
        local = type(network)(nn.Identity(), [stages[i] for i in self.local_stages], network.num_classes)
        heads = {
            i: head for i, stage in enumerate(stages) if isinstance(head := stage.get_submodule("head"), SharedReadout)
        }
        self.shared_readouts = [heads[i] for i in self.local_stages if i in heads]
        self.source = next(((head.source[0], head.refresh) for head in heads.values()), None)
        self.local_network = self.replicas.wrap(local, optimizers) if self.topology.replicas > 1 else local
        self.local_optimizers = optimizers
        return self.pipeline_step

    def in_chunks(self, rows: int) -> bool:
        """Return whether a step on this many targets holds no beliefs."""
        return trains_in_chunks(self.network, rows, self.options)

    def pipeline_step(self, inputs: Tensor, targets: Tensor) -> StepResult:
        if isinstance(self.local_network, LanguageModel) and self.in_chunks(len(targets)):
            assert not isinstance(self.prior, Tensor)  # for type checkers
            return train_readouts(
                self.local_network, inputs, targets, self.local_options, self.local_optimizers, self.link, self.prior,
                predicts=self.topology.is_last,
            )  # fmt: skip
        assert not isinstance(self.prior, PriorHead)
        clear_gradients(self.local_optimizers)
        return StepResult(*stage_by_stage(
            self.local_network, inputs, targets, self.local_options, self.local_optimizers, hooks=self.link,
            prior=self.prior,
        ))  # fmt: skip

    def train_batches(self, epoch: int, first_step: int) -> Generator[tuple[Any, Tensor]]:
        self.link.reset_counters()
        self.link.expect(self.local_rows("train")[first_step:], self.in_chunks)
        self.steps_done = (epoch - 1) * len(self.batches["train"]) + first_step
        return super().train_batches(epoch, first_step)

    def link_usage(self) -> dict[str, float]:
        return {name: getattr(self.link, name) for name in ("receiving", "sending", "bytes_sent")}

    def local_rows(self, name: str) -> list[int]:
        (replica, replicas), batches = self.topology.share, self.batches[name]
        return [len(range(replica, rows // batches.context, replicas)) for rows in batches.sizes()]

    def exchange_copies(self) -> None:
        """Send the last stage's weight to the shared readouts of other ranks, if the next step is the one to do so."""
        if self.source and self.steps_done % self.source[1] == 0:
            if self.topology.is_last:
                self.link.send_back(self.source[0].weight)
            else:  # it has a shared readout: only the last stage has not
                self.link.recv_back(self.shared_readouts)
        self.steps_done += 1

    def recv_inputs(self, inputs: Any) -> Any:
        """Return the inputs of the next step; ranks after the first one also receive whether it is the last step."""
        self.exchange_copies()
        if not self.topology.is_first:
            inputs, self.prior = self.link.recv()
            self.stop = self.link.stop
            return inputs
        self.prior = None  # the uniform belief
        inputs = super().recv_inputs(inputs)
        self.link.stop = self.stop
        return inputs

    def evaluation_batches(self, name: str) -> Iterator[tuple[Any, Tensor]]:
        rows = self.local_rows(name)
        if isinstance(self.network, LanguageModel):  # as `in_parts` splits them
            most = windows_at_once(self.network, self.batches[name].context)
            rows = [min(most, count - i) for count in rows for i in range(0, count, most)]
        self.link.expect(rows)
        return super().evaluation_batches(name)

    def stage_logits(self, inputs: Any) -> tuple[list[Tensor], Tensor]:
        features, first_prior = (
            (inputs, self.local_network.uniform(inputs)) if self.topology.is_first else self.link.recv()
        )
        assert isinstance(first_prior, Tensor)  # for type checkers
        prior, logits = first_prior, []
        with autocast(features, self.options.dtype):
            for stage in self.local_network.stages:
                features, z = stage(features, prior)
                prior = at_least_float32(z).softmax(dim=1)
                logits.append(z)
        self.link.send(features, prior)
        return logits, first_prior

    def wait_for_sends(self) -> None:
        self.link.wait_for_room()
        self.link.wait_for_copies()
        super().wait_for_sends()

    def local_state(self, state: dict) -> dict:
        state = local_state(state, self.network.state_dict(), self.optimizers, self.local_stages)
        return super().local_state(state)
