"""Random streams that belong to a row, so that results do not depend on order, range, shard or resume.

A stream is named by (seed, purpose, ...). Its Philox key is a hash of the name. Numbers are drawn on the CPU.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # imported where it is used, so that commands that only read recipes answer at once
    import torch

NoiseKind = Literal["numpy", "philox"]
"""What draws the noise of a defense, and the starts of attacks in training.

numpy draws on the CPU, `advdiff_cli.data.philox` on the device that computes.
"""

RowKey = int | str
"""The name of a row: its index in the origin set, or its relative path in a folder."""


def stream_digest(seed: int, purpose: str, *names: RowKey) -> bytes:
    """Return 128 bits that stand for the name (seed, purpose, names) of a stream."""
    name = repr((int(seed), purpose, *(n if isinstance(n, str) else int(n) for n in names)))
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def stream(seed: int, purpose: str, *names: RowKey) -> np.random.Generator:
    """Return the generator named by (seed, purpose, names)."""
    key = int.from_bytes(stream_digest(seed, purpose, *names), "little")
    return np.random.Generator(np.random.Philox(key=key))


def row_stream(seed: int, purpose: str, row: RowKey, *, draw: int = 0, restart: int = 0) -> np.random.Generator:
    """Return the generator of one row."""
    return stream(seed, purpose, draw, restart, row)


@contextmanager
def torch_seeded(device: "torch.device", seed: int, purpose: str, *names: RowKey) -> Iterator[None]:
    """Seed torch's global generator from a stream inside the block, for layers such as dropout; restore it after."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(stream(seed, purpose, *names).integers(2**63)))
        yield


class RowStreams:
    """One random stream for each row of a batch."""

    def __init__(self, seed: int, purpose: str, rows: Sequence[RowKey], *, draw: int = 0, restart: int = 0) -> None:
        """Open the streams of `rows`; a padded batch may name a row more than once."""
        self._streams = [row_stream(seed, purpose, row, draw=draw, restart=restart) for row in rows]

    def normal(self, *shape: int) -> "torch.Tensor":
        """Draw (B, *shape) standard normal float32 numbers, each row from its own stream."""
        import torch

        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in self._streams]))

    def uniform(self, *shape: int) -> "torch.Tensor":
        """Draw (B, *shape) float32 numbers, uniform on [-1, 1)."""
        import torch

        return torch.from_numpy(np.stack([s.random(shape, dtype=np.float32) * 2 - 1 for s in self._streams]))
