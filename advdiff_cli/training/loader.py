"""The rows of a training run: concatenated sets, in an order that depends on (seed, epoch), read ahead by a thread."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from advdiff_cli.data.distributed import local_processes
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.data.rng import stream
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import free_memory

_log = logging.getLogger(__name__)

_USABLE_SHARE = 0.5  # of free memory


def in_memory_for_gpu(sets: Sequence[PatchSet], device: torch.device) -> list[PatchSet]:
    """Return sets of the same rows, kept in memory if all of them fit and if `device`, which trains on them, is a GPU.

    A GPU would wait for random rows of a file. On a CPU a step takes longer than reading its rows.

    Args:
        sets: To train on, and to validate on; of one selection. Those of one path are the same set, kept once.
        device: Where to train. The processes of torchrun on one machine share its memory.

    Raises:
        AdvdiffError: The sizes of a set differ, or a row cannot be read.
    """
    if device.type == "cpu":
        return list(sets)
    distinct = {s.path: s for s in sets}
    needed = sum(len(s) * s.source.read(np.zeros(1, np.int64)).nbytes for s in distinct.values())
    usable = _USABLE_SHARE * free_memory(torch.device("cpu")) / local_processes()
    if needed > usable:
        message = (
            "the training sets are read from their files at each step: they need %.1f GB of memory, and may use %.1f"
        )
        _log.warning(message, needed / 1e9, usable / 1e9)
        return list(sets)
    loaded = {path: s.in_memory() for path, s in distinct.items()}
    return [loaded[s.path] for s in sets]


class TrainingRows:
    """Concatenated patch sets of one size; a set named k times counts k times."""

    def __init__(self, sets: Sequence[PatchSet], *, labeled: bool) -> None:
        """Concatenate `sets`.

        Raises:
            AdvdiffError: Sizes differ, or labels are missing and `labeled` asks for them.
        """
        shapes = {s.require_shape() for s in sets}
        if len(shapes) > 1:
            raise AdvdiffError(f"the training sets differ in patch size: {sorted(shapes)}; train on one size")
        self.shape = shapes.pop()
        self._sets = sets
        self._ends = np.cumsum([len(s) for s in sets])
        self._labels = np.concatenate([s.require_labels() for s in sets]) if labeled else None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return float32 images (B, 3, H, W) in [0, 1] and labels (B,), which are 0 in unlabeled sets."""
        images = torch.empty((len(rows), 3, *self.shape))
        which = np.searchsorted(self._ends, rows, side="right")
        for k in np.unique(which):
            chosen = np.flatnonzero(which == k)
            start = self._ends[k] - len(self._sets[k])
            images[torch.from_numpy(chosen)] = self._sets[k].read(rows[chosen] - start)
        labels = np.zeros(len(rows), np.int64) if self._labels is None else self._labels[rows]
        return images, torch.from_numpy(labels)

    def steps(self, batch_size: int) -> int:
        """Return the number of full batches in an epoch; at least 1."""
        return max(1, len(self) // batch_size)

    def batches(
        self, first: int, last: int, batch_size: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps `first` to `last` - 1, over as many epochs as needed; `part` as for `epoch`."""
        step = first
        while step < last:
            epoch, skip = divmod(step, self.steps(batch_size))
            for batch in self.epoch(epoch, batch_size, seed, skip=skip, part=part):
                yield batch
                step += 1
                if step == last:
                    return

    def epoch(
        self, epoch: int, batch_size: int, seed: int, *, skip: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, in the order given by (seed, epoch), from batch `skip` on.

        Args:
            epoch: Which epoch.
            batch_size: Rows in a batch, over all processes.
            seed: Of the order.
            skip: Batches to leave out.
            part: (i, n): the i-th of n equal parts of each batch, for process i of n; n divides `batch_size`.
        """
        order = stream(seed, "order", epoch).permutation(len(self))
        i, n = part
        share = batch_size // n
        starts = [b * batch_size + i * share for b in range(skip, self.steps(batch_size))]
        chosen = (np.take(order, np.arange(start, start + share), mode="wrap") for start in starts)
        yield from prefetch(self.read, chosen)
