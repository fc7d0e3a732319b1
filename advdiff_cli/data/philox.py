"""Random numbers from a counter, drawn on any device for all rows of a batch at once: Philox4x32-10.

The name of a stream gives its key and its first count, so that a number depends on the name and its position alone.
Numbers are those of torch's own generator of this kind, where torch has one, up to the rounding of log, sin and cos.
That is coarse on CUDA, whose fast functions may move numbers near zero by some 1e-3 (not measured).

Source: Salmon, Moraes, Dror & Shaw 2011, Parallel random numbers: as easy as 1, 2, 3.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import pi, prod

import torch
from torch import Tensor

from advdiff_cli.data.rng import RowKey, stream_digest

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # of the two halves of the key, from round to round
_ROUNDS = 10
_LOW = 2**32 - 1
_COUNTS = 2**62  # first counts are below, so that counting does not overflow


def row_keys(
    seed: int, purpose: str, rows: Sequence[RowKey], draws: Sequence[int], *, restart: int = 0, device: torch.device
) -> Tensor:
    """Return the key and the first count of a stream for each pair of a row and a draw, (B, 2) int64."""
    digests = [stream_digest(seed, purpose, d, restart, r) for r, d in zip(rows, draws, strict=True)]
    numbers = [
        (int.from_bytes(d[:8], "little", signed=True), int.from_bytes(d[8:], "little") % _COUNTS) for d in digests
    ]
    keys = torch.tensor(numbers, dtype=torch.int64)
    return keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys.to(device)


def integers(keys: Tensor, n: int) -> Tensor:
    """Return the first n numbers of each stream (B, n), int64 in [0, 2**32).

    Args:
        keys: (B, 2), from `row_keys`.
        n: A multiple of 4.
    """
    count = keys[:, 1:] + torch.arange(n // 4, device=keys.device)
    a, b = count & _LOW, count >> 32
    c = d = torch.zeros_like(count)
    k, m = keys[:, :1] & _LOW, keys[:, :1] >> 32 & _LOW
    for _ in range(_ROUNDS):
        first, third = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2**64, as int64
        a, b, c, d = (third >> 32 & _LOW) ^ b ^ k, third & _LOW, (first >> 32 & _LOW) ^ d ^ m, first & _LOW
        k, m = k + _INCREMENTS[0] & _LOW, m + _INCREMENTS[1] & _LOW
    return torch.stack([a, b, c, d], 2).flatten(1)


def normal(keys: Tensor, n: int) -> Tensor:
    """Return the first n standard normal numbers of each stream (B, n), float32.

    Args:
        keys: (B, 2), from `row_keys`.
        n: How many.
    """
    if _has_kernel(keys.device.type):  # one instead of a hundred
        drawn: Tensor = torch._philox_normal_(
            torch.empty((len(keys), n), device=keys.device), keys.view(torch.uint64)[:, None]
        )
        return drawn
    return box_muller(integers(keys, -(-n // 4) * 4))[:, :n]


class DeviceStreams:
    """One random stream for each row of a batch, as `RowStreams` of draw 0, whose numbers are drawn on a device."""

    def __init__(self, seed: int, purpose: str, rows: Sequence[RowKey], device: torch.device) -> None:
        """Open the streams of `rows`."""
        self._keys = row_keys(seed, purpose, rows, [0] * len(rows), device=device)

    def normal(self, *shape: int) -> Tensor:
        """Draw (B, *shape) standard normal float32 numbers, each row from its own stream."""
        return normal(self._next(prod(shape)), prod(shape)).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw (B, *shape) float32 numbers, uniform on [-1, 1)."""
        n = prod(shape)
        numbers = integers(self._next(n), -(-n // 4) * 4)[:, :n] >> 8  # as many bits as a float32 holds
        return (numbers.float() * 2.0**-23 - 1).view(-1, *shape)

    def _next(self, n: int) -> Tensor:
        """Return the keys and first counts (B, 2) of the next n numbers of each stream."""
        keys = self._keys.clone()
        self._keys[:, 1] += -(-n // 4)
        return keys


@cache
def _has_kernel(kind: str) -> bool:
    """Return whether torch has a generator for this kind of device."""
    has: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(torch, "_philox_normal_") and has("aten::_philox_normal_", kind.upper())


def box_muller(numbers: Tensor) -> Tensor:
    """Return standard normal numbers (B, n), float32, from integers (B, n) in [0, 2**32); n is even."""
    uniform = numbers.float() * 2.0**-32 + 2.0**-33  # in (0, 1]
    radius, angle = (-2 * uniform[:, ::2].log()).sqrt(), 2 * pi * uniform[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)
