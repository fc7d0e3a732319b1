"""Which rows of a patch set are used, and in which batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.provenance import JsonObject


def row_batches(n: int, size: int, *, pad: bool = False) -> Iterator[Rows]:
    """Yield the row numbers 0 to n - 1 in batches of `size`; `pad` fills the last batch by repeating the last row."""
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size if pad else min(start + size, n)), n - 1)


@dataclass(frozen=True)
class Selection:
    """Which rows of a set: shuffled, then a range of the shuffled order, then at most `limit` of them."""

    limit: int | None = None
    range: tuple[int, int | None] | None = None
    shuffle_seed: int | None = None

    def rows(self, n: int) -> Rows:
        """Return the selected row numbers among n."""
        order = np.arange(n)
        if self.shuffle_seed is not None:
            order = np.random.Generator(np.random.Philox(self.shuffle_seed)).permutation(n)
        if self.range is not None:
            order = order[slice(*self.range)]
        return order[: self.limit].astype(np.int64)

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return {"limit": self.limit, "range": self.range and list(self.range), "shuffle_seed": self.shuffle_seed}


ALL = Selection()
