"""This process among its peers under `torchrun`: its place in a mesh of data and stage ranks, and what peers tell each
other besides batches. Nothing here knows how a network is trained.

Peers trust one another: settings pass between them as pickles, states as plain tensors and numbers.
"""

import io
import os
import time
import uuid
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PARALLEL = ("none", "data", "shard", "stage")
LOST = (
    "connection",
    "by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "nccl",
)  # said of a peer that is gone
SIZE, STATE = 1001, 1002  # tags of what is told


class LostRank(RuntimeError):
    """A peer ended, or said nothing for too long; its own message, if it had one, tells why."""


@dataclass(frozen=True)
class Place:
    """Rank `stage` of `stages` in the pipeline, in replica `replica` of `replicas`; rank 0 of both where alone.

    The last stage's rank of the first replica, `recorder`, keeps the run's folder: it is the last to finish a step.
    """

    stage: int = 0
    stages: int = 1
    replica: int = 0
    replicas: int = 1
    timeout: float = 600.0  # seconds
    start: str | None = None  # of `torchrun`, the same on all ranks and after every restart
    control: Any = None  # the group (gloo) in which everyone talks of other things than batches
    data: Any = None  # the group of the replicas of this rank's stages

    @property
    def rank(self) -> int:
        return self.replica * self.stages + self.stage

    @property
    def recorder(self) -> int:
        return self.stages - 1

    @property
    def records(self) -> bool:
        return self.rank == self.recorder

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def size(self) -> int:
        return self.stages * self.replicas


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def restarted() -> bool:
    """Whether `torchrun` started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def this_start(store: dist.Store | None = None) -> str | None:
    """What tells one start of `torchrun` from another, through all its restarts; None without it, and where nothing
    does. `store`: that of all processes, where this one knows it already."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # no store that outlives a restart
        name = os.environ.get("TORCHELASTIC_RUN_ID")
        return None if name == "none" else name  # "none": torchrun's, where it was given no --rdzv-id
    if store is None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
        except (dist.DistError, RuntimeError):
            return None
    return store.compare_set("start", "", uuid.uuid4().hex).decode()  # --rdzv-id may be that of an earlier start


def speaks() -> bool:
    """Whether this process tells what is wrong: before they have met, all on a machine find the same wrong."""
    if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return True
    time.sleep(1)  # the first process that ends makes torchrun end the others: let it not be before the one that speaks
    return False


def own_device(name: str) -> str:
    """`auto` and `cuda` are the GPU that has this process's local rank, where there are GPUs."""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    wanted = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), rank + 1)
    if wanted > count:
        raise ValueError(f"device {name!r} is a GPU for each process: there are {count} for {wanted}")
    return f"cuda:{rank}"


def join(
    parallel: str, settings: dict | str, *, replicas: int = 1, timeout: float = 600.0, device: str = "auto"
) -> Place:  # fmt: skip
    """Meet the other processes that `torchrun` started; the place of this one among them.

    parallel: "data" or "shard", a replica each, or "stage", consecutive stages each, in `replicas` replicas.
    settings: must be the same everywhere; or, where there are none, what is wrong here. timeout: seconds after which a
    silent peer counts as lost.

    Raises ValueError, on one rank (the others leave with status 2), where the processes cannot work together.
    """
    world = world_size()
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel {parallel!r} needs torchrun: torchrun --standalone --nproc-per-node=2 -m sid_trainer ..."
        )
    stages = world // replicas if parallel == "stage" else 1
    replicas = replicas if parallel == "stage" else world
    if stages * replicas != world:
        raise ValueError(f"replicas must divide the number of processes, {world}, not be {replicas}")
    cuda = own_device(device).startswith("cuda")
    if cuda:
        torch.cuda.set_device(own_device(device))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        within = timedelta(seconds=timeout)
        store, rank, _ = next(dist.rendezvous("env://", timeout=within))
        start, store = this_start(store), fresh(store, rank, world, timeout)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=within)
    except (dist.DistError, RuntimeError) as error:
        what = f"{address}: cannot meet the other processes there"
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{what} (in use by another program); choose another port") from error
        raise LostRank(f"rank {os.environ['RANK']}: {what} ({str(error).splitlines()[0]})") from error
    with watching(Place(replica=rank, timeout=timeout), "another rank"):
        place = Place(
            stage=rank % stages, stages=stages, replica=rank // stages, replicas=replicas, timeout=timeout, start=start,
            control=dist.new_group(backend="gloo", timeout=within),
        )  # fmt: skip
        agree(place, settings if isinstance(settings, str) else {"torch": str(torch.__version__), **settings})
        columns = [  # of the mesh: `init_device_mesh` would make the same groups, but with a timeout of 30 minutes
            dist.new_group([replica * stages + stage for replica in range(replicas)], timeout=within)
            for stage in range(stages)
        ]
    return replace(place, data=columns[place.stage])


def fresh(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A part of the store that only the processes of this start know. torchrun keeps one store over its restarts, in
    which a new process would find the addresses of those that are gone."""
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"here/{rank}", own)
        first = store.get(f"seen/{own}").decode()  # waits for rank 0's answer to this very process
        store.set(f"met/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"seen/{store.get(f'here/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"met/{own}/{other}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"rank {min(missing)} did not come within {timeout:g} seconds")
        time.sleep(0.005)
    return dist.PrefixStore(own, store)


def gathered(place: Place | None, what: Any) -> list:
    """What every rank says; alone, what this process does."""
    every = [what] * (place.size if place else 1)
    if place:
        with watching(place, "another rank"):
            dist.all_gather_object(every, what, group=place.control)
    return every


def agree(place: Place, settings: dict | str) -> None:
    """What differs between ranks, or a text in its place, what is wrong there, is said by one and ends all."""
    every = gathered(place, settings)
    for rank, there in enumerate(every):
        if isinstance(there, str):
            refuse(place, there if every.count(there) == place.size else f"rank {rank}: {there}")
    for rank, there in enumerate(every):
        for name in every[0] | there:
            if there.get(name) != every[0].get(name):
                refuse(
                    place, f"{name} is {there.get(name)!r} on rank {rank} and {every[0].get(name)!r} on rank 0: all"
                    " processes need the same settings, data and run"
                )  # fmt: skip


def refuse(place: Place, message: str) -> None:
    """What every rank found wrong is said by one."""
    if place.rank == 0:
        raise ValueError(message)
    time.sleep(1)  # as in `speaks`
    raise SystemExit(2)


@contextmanager
def said_once(place: Place | None):
    """What is wrong within it, on all ranks or on one, is said by one and ends all."""
    if place is None:
        yield
        return
    wrong: dict | str = {}
    try:
        yield
    except (ValueError, OSError) as error:
        wrong = str(error)
    agree(place, wrong)


def tell_all(place: Place, what: Any) -> Any:
    """What rank 0 says."""
    said = [what]
    dist.broadcast_object_list(said, 0, group=place.control)
    return said[0]


@contextmanager
def watching(place: Place, whom: str):
    """Turn what a backend raises when a peer is gone, of many kinds, into one line."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        known = isinstance(error, LostRank | torch.OutOfMemoryError)
        if known or not any(word in told for word in LOST):
            raise
        silent = "timed out" in told or "timeout" in told
        how = f"said nothing for {place.timeout:g} seconds" if silent else "is gone"
        raise LostRank(f"rank {place.rank}: {whom} {how}; the last checkpoint is kept") from error


class Reports:
    """What ranks tell the recorder, heard in the order in which it was told. Telling waits for nothing until two things
    told are not heard yet, an epoch's row and its checkpoint: the pipeline does not run empty."""

    def __init__(self, place: Place):
        self.place = place
        self.telling: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()

    def tell(self, what: Any) -> None:
        buffer = io.BytesIO()
        torch.save(what, buffer)
        self.finish(left=1)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        told = []
        for tensor, tag in ((torch.tensor([len(content)]), SIZE), (content, STATE)):
            with watching(self.place, f"rank {self.place.recorder}"):
                work = dist.isend(tensor, self.place.recorder, group=self.place.control, tag=tag)
            told.append((work, tensor))
        self.telling.append(told)

    def finish(self, left: int = 0) -> None:
        """Wait until all but the last `left` things that were told have been heard."""
        while len(self.telling) > left:
            with watching(self.place, f"rank {self.place.recorder}"):
                for work, _ in self.telling.popleft():
                    work.wait()

    def hear(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        with watching(self.place, f"rank {rank}"):
            dist.recv(size, rank, group=self.place.control, tag=SIZE)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, rank, group=self.place.control, tag=STATE)
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True)

    def gather(self, own: Any) -> list[Any] | None:
        """On the recorder what every rank told, in their order; elsewhere None."""
        if not self.place.records:
            return self.tell(own)
        return [own if rank == self.place.rank else self.hear(rank) for rank in range(self.place.size)]


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
