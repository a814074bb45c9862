"""Processes under torchrun find one another and exchange everything but batches. Nothing here knows of networks.

Processes trust one another: settings pass between them as pickles, states as plain tensors and numbers.
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
LOST = ("connection", "by peer", "broken pipe", "timed out", "timeout", "nccl")
SIZE_TAG, STATE_TAG = 1001, 1002


class LostRank(RuntimeError):
    """A peer ended or was silent for too long; its own message, if it had one, says why."""


class Communicator:
    """Messages between the processes of a run; for a process alone, every method returns at once.

    Args:
        timeout: Seconds after which a silent peer counts as lost.
        control_group: Every process, for messages on the CPU.
        replica_group: The processes that own the same stages, one in each replica.
    """

    def __init__(
        self, topology: Topology, timeout: float = 600.0, control_group: Any = None, replica_group: Any = None
    ):
        self.topology, self.timeout = topology, timeout
        self.control_group, self.replica_group = control_group, replica_group
        self.sending: deque[list[tuple[Any, torch.Tensor]]] = deque()
        self.has_checkpoint: Callable[[], bool] = lambda: False  # whether the run can be resumed

    @property
    def is_logging(self) -> bool:
        return self.topology.rank == self.topology.logging_rank

    @contextmanager
    def watch(self, peer: str = "another rank") -> Iterator[None]:
        """Raise LostRank, which names `peer`, for the many errors that backends raise if it is gone."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            known = self.topology.size == 1 or isinstance(error, LostRank | torch.OutOfMemoryError)
            if known or not any(word in text for word in LOST):
                raise
            silent = "timed out" in text or "timeout" in text
            how = f"said nothing for {self.timeout:g} seconds" if silent else "is gone"
            kept = "the last checkpoint is kept" if self.has_checkpoint() else "nothing was saved yet"
            raise LostRank(f"rank {self.topology.rank}: {peer} {how}; {kept}") from error

    def gather(self, value: Any) -> list:
        """Return the values of all ranks on every rank."""
        values = [value] * self.topology.size
        if self.topology.size > 1:
            with self.watch():
                dist.all_gather_object(values, value, group=self.control_group)
        return values

    def check_same(self, values: dict, problem: str = "") -> None:
        """End all processes with one message if a rank has a problem, or values that differ from rank 0's."""
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
        """End all processes, which all call this: rank 0 raises ValueError, the others exit with status 2."""
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

        A sender only waits until all but its last two values were received, an epoch's results and its checkpoint, so
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
        self.wait_for_sends(left=1)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        target, messages = self.topology.logging_rank, ((torch.tensor([len(content)]), SIZE_TAG), (content, STATE_TAG))
        with self.watch(f"rank {target}"):
            sends = [(dist.isend(x, target, group=self.control_group, tag=tag), x) for x, tag in messages]
        self.sending.append(sends)

    def wait_for_sends(self, left: int = 0) -> None:
        """Wait until the logging rank has received all but the last `left` values."""
        while len(self.sending) > left:
            with self.watch(f"rank {self.topology.logging_rank}"):
                for work, _ in self.sending.popleft():
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


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this machine."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def max_restarts() -> int:
    """Return how often torchrun may start the processes again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def launch_id() -> str | None:
    """Return the id of this launch of torchrun, the same after a restart. None without --standalone or --rdzv-id."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if launch == "none" else launch


def is_main_process() -> bool:
    """Return whether this process prints errors: each one after `init_distributed`, before it one per machine."""
    return dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0


def wait_for_main_process() -> None:
    """Give the main process time to print an error: torchrun ends the others as soon as one has ended."""
    time.sleep(1)


def local_device(name: str) -> str:
    """Return the GPU of this process's local rank for "auto" and "cuda" if there are GPUs, else `name`."""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    needed = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), rank + 1)
    if needed > count:
        raise ValueError(f"device {name!r} is a GPU for each process: there are {count} for {needed}")
    return f"cuda:{rank}"


def init_distributed(
    parallel: str, settings: dict, *, problem: str = "", replicas: int = 1, timeout: float = 600.0, device: str = "auto"
) -> Communicator:
    """Connect to the other processes that torchrun started.

    Args:
        parallel: "data" or "shard", where each process is a replica, or "stage", with `replicas` pipelines.
        settings: Must be the same on all ranks.
        problem: What is wrong on this rank; it ends all of them.
        timeout: Seconds after which a silent peer counts as lost.

    Raises ValueError on rank 0, and SystemExit on the others, if the processes cannot work together. Raises LostRank if
    they cannot be reached.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel {parallel!r} needs torchrun: torchrun --standalone --nproc-per-node=2 -m sid_trainer ..."
        )
    topology = Topology.of(int(os.environ["RANK"]), world_size(), parallel, replicas)
    cuda, within = local_device(device).startswith("cuda"), timedelta(seconds=timeout)
    if cuda:
        torch.cuda.set_device(local_device(device))
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=within))
        store = attempt_store(store, rank, world, timeout)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=within)
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"{address}: cannot meet the other processes there"
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{reason} (in use by another program); choose another port") from error
        raise LostRank(f"rank {topology.rank}: {reason} ({str(error).splitlines()[0]})") from error
    communicator = Communicator(topology, timeout)
    with communicator.watch():
        communicator.control_group = dist.new_group(backend="gloo", timeout=within)
        communicator.check_same({"torch": str(torch.__version__), **settings}, problem)
        ranks = [topology.replica_ranks(stage_rank) for stage_rank in range(topology.stage_ranks)]
        groups = [dist.new_group(list(some), timeout=within) for some in ranks]  # `init_device_mesh` takes no timeout
    communicator.replica_group = groups[topology.stage_rank]
    return communicator


def attempt_store(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """Return a part of the store that only the processes of this attempt know.

    torchrun keeps one store over restarts, in which new processes would find the addresses of lost ones. The restart
    count does not name an attempt: machines count on their own. So rank 0 answers each process by the id it drew, until
    all that it answered have come.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"here/{rank}", own)
        first = store.get(f"answer/{own}").decode()  # waits for rank 0
        store.set(f"came/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"came/{own}/{other}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"rank {min(missing)} did not come within {timeout:g} seconds")
        time.sleep(0.005)
    return dist.PrefixStore(own, store)


def leave() -> None:
    """Disconnect from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
