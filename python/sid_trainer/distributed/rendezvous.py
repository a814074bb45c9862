"""Connect the processes that torchrun started, and exchange everything except batches. Nothing here knows networks.

Processes trust one another: they exchange settings as pickles, and states as plain tensors and numbers.
"""

import io
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .topology import Topology

# Words in the errors that backends raise if a peer is gone or silent.
LOST_PEER_WORDS = ("connection", "by peer", "broken pipe", "timed out", "timeout", "nccl")
SIZE_TAG, STATE_TAG = 1001, 1002


class LostRank(RuntimeError):
    """Raised if another rank ended or was silent for too long. That rank's own message, if it printed one, says why."""


class Communicator:
    """Messages between the processes of a run. In a run of one process, no method waits.

    Args:
        timeout: Seconds after which a silent peer counts as lost.
        control_group: Process group of all processes, for messages on the CPU.
        replica_group: Process group of those that own the same stages, one in each replica.
    """

    def __init__(
        self, topology: Topology, timeout: float = 600.0, control_group: Any = None, replica_group: Any = None
    ):
        self.topology, self.timeout = topology, timeout
        self.control_group, self.replica_group = control_group, replica_group
        self.pending_sends: deque[list[tuple[Any, torch.Tensor]]] = deque()
        self.has_checkpoint: Callable[[], bool] = lambda: False  # whether the run can be resumed

    @property
    def is_logging(self) -> bool:
        return self.topology.rank == self.topology.logging_rank

    @contextmanager
    def watch(self, peer: str = "another rank") -> Iterator[None]:
        """Raise LostRank, which names `peer`, instead of the various errors that backends raise if it is gone."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            unrelated = self.topology.size == 1 or isinstance(error, LostRank | torch.OutOfMemoryError)
            if unrelated or not any(word in text for word in LOST_PEER_WORDS):
                raise
            timed_out = "timed out" in text or "timeout" in text
            state = f"sent nothing for {self.timeout:g} seconds" if timed_out else "is gone"
            checkpoint = "the last checkpoint is kept" if self.has_checkpoint() else "nothing was saved yet"
            raise LostRank(f"rank {self.topology.rank}: {peer} {state}; {checkpoint}") from error

    def gather(self, value: Any) -> list:
        """Return a list of the values of all ranks, on every rank."""
        values = [value] * self.topology.size
        if self.topology.size > 1:
            with self.watch():
                dist.all_gather_object(values, value, group=self.control_group)
        return values

    def check_same(self, values: dict, problem: str = "") -> None:
        """End all processes with one message if a rank reports a problem, or if its values differ from rank 0's."""
        everyone = self.gather((values, problem))
        problems = [text for _, text in everyone]
        for rank, text in enumerate(problems):
            if text:
                self.abort_all(text if problems.count(text) == len(problems) else f"rank {rank}: {text}")
        first = everyone[0][0]
        for rank, (other, _) in enumerate(everyone):
            for name in first | other:
                if other.get(name) != first.get(name):
                    self.abort_all(
                        f"{name} is {other.get(name)!r} on rank {rank} and {first.get(name)!r} on rank 0: all processes"
                        " need the same settings, data and run"
                    )

    def abort_all(self, message: str) -> NoReturn:
        """End all processes, each of which must call this: rank 0 raises ValueError, the others exit with status 2."""
        if self.topology.rank == 0:
            raise ValueError(message)
        # torchrun ends the other processes as soon as one has ended, so rank 0 must be first: wait until it is gone.
        with suppress(RuntimeError):
            dist.recv(torch.empty(1), 0, group=self.control_group)
        raise SystemExit(2)

    @contextmanager
    def raise_on_one_rank(self) -> Iterator[None]:
        """End all processes with one message if this context raises ValueError or OSError on any of them."""
        if self.topology.size == 1:
            yield
            return
        problem = ""
        try:
            yield
        except (ValueError, OSError) as error:
            problem = str(error) or type(error).__name__
        self.check_same({}, problem)

    # ---------------------------------------------------------------- to the logging rank

    def gather_on_logging_rank(self, value: Any) -> list | None:
        """Return the values of all ranks on the logging rank and None elsewhere.

        A sender does not wait until its last two values, an epoch's results and its checkpoint, have been received, so
        the pipeline does not run empty.
        """
        if not self.is_logging:
            self.send(value)
            return None
        return [value if rank == self.topology.rank else self.recv(rank) for rank in range(self.topology.size)]

    def send(self, value: Any) -> None:
        """Send tensors and numbers to the logging rank."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.wait_for_sends(pending=1)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        rank, messages = self.topology.logging_rank, ((torch.tensor([len(content)]), SIZE_TAG), (content, STATE_TAG))
        with self.watch(f"rank {rank}"):
            sends = [(dist.isend(x, rank, group=self.control_group, tag=tag), x) for x, tag in messages]
        self.pending_sends.append(sends)

    def wait_for_sends(self, pending: int = 0) -> None:
        """Wait until the logging rank has received all but the last `pending` values."""
        while len(self.pending_sends) > pending:
            with self.watch(f"rank {self.topology.logging_rank}"):
                for work, _ in self.pending_sends.popleft():
                    work.wait()

    def recv(self, rank: int) -> Any:
        """Receive the next value that a rank sent."""
        size = torch.zeros(1, dtype=torch.int64)
        with self.watch(f"rank {rank}"):
            dist.recv(size, rank, group=self.control_group, tag=SIZE_TAG)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, rank, group=self.control_group, tag=STATE_TAG)
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- torchrun's environment


def torchrun_number(name: str, default: int = 0) -> int:
    """Return a number that torchrun sets in the environment, such as WORLD_SIZE, or `default` without torchrun."""
    return int(os.environ.get(name, default))


def launch_id() -> str | None:
    """Return the id of this launch of torchrun, the same after a restart. None without --standalone or --rdzv-id."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if launch == "none" else launch


def is_main_process() -> bool:
    """Return whether this process prints errors: every process after `init_distributed`, one per machine before it."""
    return dist.is_initialized() or torchrun_number("LOCAL_RANK") == 0


def wait_for_main_process() -> None:
    """Give the main process time to print an error: torchrun ends the others as soon as one has ended."""
    time.sleep(1)


def local_device(name: str) -> str:
    """Return the GPU of this process's local rank for "auto" and "cuda" if there are GPUs, else `name`.

    Raises ValueError if the machine has fewer GPUs than processes.
    """
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    rank, count = torchrun_number("LOCAL_RANK"), torch.cuda.device_count()
    needed = max(torchrun_number("LOCAL_WORLD_SIZE", 1), rank + 1)
    if needed > count:
        raise ValueError(f"device {name!r} needs a GPU for each of the {needed} processes, not {count} in all")
    return f"cuda:{rank}"


def init_distributed(
    parallel: str, settings: dict, *, problem: str = "", replicas: int = 1, timeout: float = 600.0, device: str = "auto"
) -> Communicator:
    """Connect to the other processes that torchrun started.

    Args:
        parallel: "data" or "shard", where each process is a replica, or "stage", with `replicas` pipelines.
        settings: Must be the same on all ranks.
        problem: An error of this rank, which ends all processes; empty if there is none.
        timeout: Seconds after which a silent peer counts as lost.

    Raises ValueError on rank 0, and SystemExit on the others, if the processes cannot work together. Raises LostRank if
    they cannot be reached.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel {parallel!r} needs torchrun: torchrun --standalone --nproc-per-node=2 -m sid_trainer ..."
        )
    topology = Topology.of(int(os.environ["RANK"]), torchrun_number("WORLD_SIZE", 1), parallel, replicas)
    cuda, limit = local_device(device).startswith("cuda"), timedelta(seconds=timeout)
    if cuda:
        torch.cuda.set_device(local_device(device))
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store = attempt_store(store, rank, world, timeout)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"{address}: cannot connect to the other processes there"
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{reason} (in use by another program); choose another port") from error
        raise LostRank(f"rank {topology.rank}: {reason} ({str(error).splitlines()[0]})") from error
    communicator = Communicator(topology, timeout)
    with communicator.watch():
        communicator.control_group = dist.new_group(backend="gloo", timeout=limit)
        communicator.check_same({"torch": str(torch.__version__), **settings}, problem)
        ranks = [topology.replica_ranks(stage_rank) for stage_rank in range(topology.stage_ranks)]
        groups = [dist.new_group(list(group), timeout=limit) for group in ranks]  # `init_device_mesh` takes no timeout
    communicator.replica_group = groups[topology.stage_rank]
    return communicator


def attempt_store(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """Return a part of `store` that only the processes of this attempt use.

    torchrun keeps one store over restarts, in which new processes would find the addresses of lost ones. The restart
    count does not identify an attempt, because each machine counts on its own. So each process draws an id, and rank 0
    answers each id with its own, until every rank has confirmed the answer.
    """
    own_id, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"here/{rank}", own_id)
        attempt = store.get(f"answer/{own_id}").decode()  # waits for rank 0
        store.set(f"came/{attempt}/{rank}", "")
        return dist.PrefixStore(attempt, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", own_id)
        missing = {other for other in missing if not store.check([f"came/{own_id}/{other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} did not connect within {timeout:g} seconds")
        time.sleep(0.005)
    return dist.PrefixStore(own_id, store)


def leave() -> None:
    """Disconnect from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
