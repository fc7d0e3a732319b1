"""The processes that torchrun started together, where it did: which one this is, and where they wait for each other."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=7)  # shares of the work may differ by hours


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`; the first writes and speaks for all."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        self.sums([0])

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """Return the sums of each number over the processes."""
        total = torch.tensor(numbers)
        if self.count > 1:
            distributed.all_reduce(total)
        return [int(n) for n in total]


def process_count() -> int:
    """Return how many processes torchrun started together; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def together() -> Iterator[Processes]:
    """Join the other processes, as RANK, WORLD_SIZE and MASTER_ADDR name them, and leave them at the end."""
    if process_count() == 1:
        yield Processes()
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:  # a group that is left standing aborts the process as it ends
        distributed.destroy_process_group()
