"""How many patches are computed at once, as --batch-size asks for it."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from advdiff_cli import console
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from torch import device as Chip
    from torch import nn


def batch_size(
    asked: object | None, begun: Mapping[str, Any], default: int, module: "nn.Module", shape: tuple[int, int],
    n: int | None, chip: "Chip", *, shard: object | None = None, graph: bool = False,
) -> int:  # fmt: skip
    """Return the number of patches to compute at once.

    Args:
        asked: The option: a number, `auto`, or None.
        begun: Parameters of what stands at the output, which goes on in batches of the size it was begun with.
        default: What is taken when nothing is asked for.
        module: What computes, from images; `auto` looks at what its layers put out.
        shape: (H, W) of the images.
        n: How many images there are, where that is known.
        chip: Where it computes.
        shard: The part of the rows that is asked for.
        graph: Whether gradients are taken.

    Raises:
        AdvdiffError: `auto` is asked of one part of many, which would not agree.
    """
    from advdiff_cli.jobs.memory import batch_that_fits

    if isinstance(asked, int):
        return asked
    if asked == "auto" and (shard is not None or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise AdvdiffError("--batch-size auto: the parts of a work must agree on it; give each the same number")
    if "batch_size" in begun or asked is None:
        return int(begun.get("batch_size", default))
    size = batch_that_fits(module, *shape, chip, n=n, graph=graph)
    console.log(f"batches of {size}, by cores and free memory")
    return size
