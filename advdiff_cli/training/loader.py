"""The rows a training run reads: sets concatenated, in an order owned by (seed, epoch), read ahead by one thread."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.prefetch import ahead
from advdiff_cli.data.rng import stream
from advdiff_cli.errors import AdvdiffError


class TrainingRows:
    """Patch sets of one size, concatenated; a set named k times counts k times."""

    def __init__(self, sets: Sequence[PatchSet], *, labelled: bool) -> None:
        """Concatenate `sets`; AdvdiffError when sizes differ or labels are missing where `labelled`."""
        shapes = {s.require_shape() for s in sets}
        if len(shapes) > 1:
            raise AdvdiffError(f"the sets to train on differ in patch size: {sorted(shapes)}; train on one size")
        self.shape = shapes.pop()
        self._sets = sets
        self._ends = np.cumsum([len(s) for s in sets])
        self._labels = np.concatenate([s.require_labels() for s in sets]) if labelled else None

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return float32 images (B, 3, H, W) in [0, 1] and labels (B,); zeros where the sets have none."""
        images = torch.empty((len(rows), 3, *self.shape))
        which = np.searchsorted(self._ends, rows, side="right")
        for k in np.unique(which):
            mine = np.flatnonzero(which == k)
            start = self._ends[k] - len(self._sets[k])
            images[torch.from_numpy(mine)] = self._sets[k].read(rows[mine] - start)
        labels = np.zeros(len(rows), np.int64) if self._labels is None else self._labels[rows]
        return images, torch.from_numpy(labels)

    def steps(self, batch_size: int) -> int:
        """Return the number of whole batches in an epoch."""
        return max(1, len(self) // batch_size)

    def batches(
        self, first: int, last: int, batch_size: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps first to last - 1, through as many epochs as they take; `part` as for epoch()."""
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
        """Yield the batches of an epoch in the order that (seed, epoch) names, from batch `skip` on.

        Args:
            part: (i, n): of every batch the i-th of n equal parts, for process i of n; n divides `batch_size`.
        """
        order = stream(seed, "order", epoch).permutation(len(self))
        i, n = part
        share = batch_size // n
        starts = [b * batch_size + i * share for b in range(skip, self.steps(batch_size))]
        chosen = (np.take(order, np.arange(start, start + share), mode="wrap") for start in starts)
        yield from ahead(self.read, chosen)
