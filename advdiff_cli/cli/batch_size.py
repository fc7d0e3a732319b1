"""The number of patches computed together, from --batch-size, resumed work, or the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from advdiff_cli import console
from advdiff_cli.cli.parsers import BatchSize

if TYPE_CHECKING:
    import torch
    from torch import nn


def known_batch_size(asked: BatchSize | None, resume: Mapping[str, object]) -> int | None:
    """Return the number of patches to compute together, or None if it depends on the machine.

    Args:
        asked: The option; None if it was not given.
        resume: Parameters of the work at the output, which is resumed with the batch size it was begun with.
    """
    if asked is not None and asked.size is not None:
        return asked.size
    return cast("int | None", resume.get("batch_size"))


def resolve_batch_size(
    asked: BatchSize | None,
    resume: Mapping[str, object],
    module: nn.Module,
    shape: tuple[int, int] | None,
    device: torch.device,
    *,
    graph: bool,
    n: int | None = None,
) -> int:
    """Return the number of patches to compute together; for `auto`, by the machine.

    Args:
        asked: As for `known_batch_size`.
        resume: As for `known_batch_size`.
        module: What computes images, and is measured for `auto`.
        shape: (H, W) of the images; None for those of a folder, which have many sizes.
        device: Where it computes.
        graph: Whether gradients are computed.
        n: The number of images, if known.
    """
    from advdiff_cli.jobs.memory import auto_batch_size
    from advdiff_cli.jobs.recipes import default_batch_size
    from advdiff_cli.purification.equations import MAX_UNTILED

    if (known := known_batch_size(asked, resume)) is not None:
        return known
    if asked is None:
        return default_batch_size(device.type, shape, graph=graph)
    largest = shape or (MAX_UNTILED, MAX_UNTILED)  # of a folder that are batched
    size = auto_batch_size(module, largest, device, n=n, graph=graph)
    console.log(f"batch size {size}, by cores and free memory")
    return size
