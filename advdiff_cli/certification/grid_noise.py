"""Gaussian noise on the grid of 8-bit pixels, drawn from integers, so that noised patches are exact.

With floating-point noise, x + sigma n is rounded, and what is rounded away can tell x from another patch (Voracek &
Hein 2023; Jin et al. 2022, arXiv:2205.10159). A patch of 8-bit pixels plus a normal variable rounded to the same grid
is an exact sum of integers. Rounding to the grid is a part of the classifier that is smoothed, since

    round(x + sigma n) = x + round(sigma n)    for x on the grid,

so that the certificate holds for every perturbed patch that is an 8-bit image too.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from advdiff_cli.data import philox
from advdiff_cli.data.rng import RowKey, row_stream
from advdiff_cli.errors import AdvdiffError

_BITS = 63
_BUCKET_BITS = 16  # the first bits of a random integer, which mostly decide its value
_EXACT = 2**23  # whole numbers up to twice this are exact in float32
_TAIL = 1e-30  # the probability beyond the largest value


class GridNoise:
    """Draws z = round(s n), where n is standard normal, from 64-bit integers."""

    def __init__(self, scale: float) -> None:
        """Tabulate the distribution.

        Args:
            scale: s, the standard deviation in steps of the grid.

        Raises:
            AdvdiffError: Sums would not be exact in float32.
        """
        self.scale = scale
        count = 1
        while 2 * ndtr(-(count - 0.5) / scale) > _TAIL:
            count *= 2
        if count >= _EXACT:
            raise AdvdiffError(f"noise of {scale:.0f} grid steps is too large for exact sums; take a lower t*")
        tails = 2 * ndtr(-(np.arange(1, count + 1) - 0.5) / scale)  # P(|z| >= m), m = 1, 2, ...
        self._tails = np.sort(np.round(tails * 2.0**_BITS).astype(np.uint64))
        self._tails_on: dict[torch.device, Tensor] = {}
        edges = np.arange(2**_BUCKET_BITS + 1, dtype=np.uint64) << np.uint64(_BITS - _BUCKET_BITS)
        above = len(self._tails) - np.searchsorted(self._tails, edges, side="right")
        self._values = above[:-1].astype(np.int32)
        self._ambiguous = above[1:] != above[:-1]

    def total_variation(self, values: int) -> float:
        """Return a bound on the total variation between `values` draws and rounded normal variables.

        The table is rounded to 2^-63, and float64 computes its entries to a relative error of 2^-46.
        """
        return values * (len(self._tails) * 2.0**-_BITS + 2.0**-46 * (self.scale + 1) + _TAIL)

    def draw(self, generator: np.random.Generator, shape: Sequence[int]) -> NDArray[np.int32]:
        """Draw an array of `shape`."""
        bits = generator.integers(2**64, size=tuple(shape), dtype=np.uint64)
        uniform = bits >> np.uint64(1)
        bucket = (uniform >> np.uint64(_BITS - _BUCKET_BITS)).astype(np.int32)
        magnitude = self._values[bucket]
        unclear = self._ambiguous[bucket]
        exact = len(self._tails) - np.searchsorted(self._tails, uniform[unclear], side="right")
        magnitude[unclear] = exact.astype(np.int32)
        signed: NDArray[np.int32] = np.where(bits & np.uint64(1), magnitude, -magnitude)
        return signed

    def normal_on_device(self, keys: Tensor, n: int) -> Tensor:
        """Draw n values of each stream (B, n), as exact float32 integers.

        Args:
            keys: (B, 2) of `philox.row_keys`, on the device.
            n: How many.
        """
        words = philox.integers(keys, -(-n // 2) * 4)[:, : 2 * n].view(len(keys), n, 2)
        uniform = words[..., 0] << _BITS - 32 | words[..., 1] >> 1
        if keys.device not in self._tails_on:
            self._tails_on[keys.device] = torch.from_numpy(self._tails.astype(np.int64)).to(keys.device)
        tails = self._tails_on[keys.device]
        magnitude = (len(tails) - torch.searchsorted(tails, uniform, right=True)).float()
        return torch.where((words[..., 1] & 1).bool(), magnitude, -magnitude)

    def normal(self, seed: int, purpose: str, row: RowKey, draws: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Draw (len(draws), *shape) values of a row, each draw from its own stream, as exact float32 integers."""
        drawn = [self.draw(row_stream(seed, purpose, row, draw=draw), shape) for draw in draws]
        return torch.from_numpy(np.stack(drawn)).float()
