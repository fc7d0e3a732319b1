"""Purify the rows of a patch set, batches side by side on a CPU, the next one being read meanwhile elsewhere."""

from collections.abc import Iterator

import torch
from torch import Tensor

from advdiff_cli.data.patch_writer import Batch, PatchWriter
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.jobs.memory import batches_that_fit
from advdiff_cli.models.device import autocast, onto, spread
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.purifier import Purifier


@torch.inference_mode()
def purify_batch(purifier: Purifier, images: Tensor, noise: Tensor, precision: str) -> Tensor:
    """Purify images (B, 3, H, W) in [0, 1] with the noise given, all on the purifier's device; the result is not."""
    with autocast(precision, images.device):
        purified: Tensor = purifier(images, noise)
        return purified.float().cpu()


def purify_rows(
    purifier: Purifier, patches: PatchSet, sink: PatchWriter, *,
    batch_size: int, seed: int, precision: str, device: torch.device,
) -> Iterator[int]:  # fmt: skip
    """Purify the rows of `patches` that `sink` has not got, yielding the number of rows after each batch."""

    def read(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        images = patches.read(batch.rows)
        noise = row_noise(purifier, images, [patches.keys[i] for i in batch.rows], seed=seed, purpose="purify")
        return batch, onto(images, device), onto(noise, device)

    def purified(one: tuple[Batch, Tensor, Tensor]) -> tuple[Batch, Tensor]:
        return one[0], purify_batch(purifier, *one[1:], precision)

    at_once = batches_that_fit(purifier, *patches.require_shape(), batch_size, device)
    with sink:
        for batch, clean in spread(read, purified, sink.batches(batch_size), at_once):
            sink.write(batch, clean.numpy())
            yield batch.count
