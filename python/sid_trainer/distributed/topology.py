"""Coordinates of the processes of a run. Nothing here communicates."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Coordinates of a process in a mesh of `replicas` x `stage_ranks`; a process alone is at (0, 0) of 1 x 1.

    Each replica is a pipeline whose ranks own consecutive stages, and the replicas share every batch. Ranks are
    numbered along the pipeline of the first replica, then along that of the second one, and so on.
    """

    stage_rank: int = 0
    stage_ranks: int = 1
    replica: int = 0
    replicas: int = 1

    @classmethod
    def of(cls, rank: int, world_size: int, parallel: str, replicas: int) -> "Topology":
        """Return the coordinates of a rank. Raises ValueError if `replicas` pipelines cannot share processes evenly."""
        stage_ranks = world_size // replicas if parallel == "stage" else 1
        replicas = replicas if parallel == "stage" else world_size
        if stage_ranks * replicas != world_size:
            raise ValueError(f"replicas must be a divisor of {world_size}, the number of processes, not {replicas}")
        return cls(rank % stage_ranks, stage_ranks, rank // stage_ranks, replicas)

    @property
    def rank(self) -> int:
        return self.replica * self.stage_ranks + self.stage_rank

    @property
    def size(self) -> int:
        return self.stage_ranks * self.replicas

    @property
    def logging_rank(self) -> int:
        """The rank that writes the run's folder: the last one of the first pipeline, which finishes a step last."""
        return self.stage_ranks - 1

    @property
    def is_first(self) -> bool:
        return self.stage_rank == 0

    @property
    def is_last(self) -> bool:
        return self.stage_rank == self.stage_ranks - 1

    @property
    def share(self) -> tuple[int, int]:
        """(r, n): this process takes every n-th image of a batch, from the r-th on, counted from 0."""
        return self.replica, self.replicas

    def replica_ranks(self, stage_rank: int) -> Sequence[int]:
        """Return the ranks at this place in the pipelines, one in each replica; they own the same stages."""
        return range(stage_rank, self.size, self.stage_ranks)
