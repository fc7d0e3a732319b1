"""Purify a folder of images of any size, in batches by size; large images one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.folder_images import THREADS, FolderImage, FolderImages, Outcome, decode, group_by_size
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.purify_rows import PurifyJob
from advdiff_cli.models.device import to_device
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.equations import MAX_UNTILED

_Purified = tuple[FolderImage, NDArray[np.uint8]]
"""An image, and its purified pixels (3, H, W)."""


@dataclass(frozen=True)
class _Batch:
    """Images of one size, and the tensors to compute, in which the last image is repeated to a full batch."""

    group: list[FolderImage]
    images: Tensor
    noise: Tensor


@dataclass(frozen=True)
class FolderPurifier:
    """Purifies the images of a folder.

    Args:
        job: How; the relative name of a file names its noise.
        images: Where they come from and go to.
    """

    job: PurifyJob
    images: FolderImages

    def run(self, loaded: Iterable[Outcome | FolderImage]) -> Iterator[Outcome]:
        """Yield the outcome of each image of `FolderImages.load`."""
        grouped = group_by_size(loaded, self.job.batch_size)
        yield from prefetch(self._finish, self._purify(grouped), threads=THREADS, depth=2 * THREADS)

    def _purify(self, grouped: Iterable[Outcome | FolderImage | list[FolderImage]]) -> Iterator[Outcome | _Purified]:
        """Compute batches in parallel, and large images after the batches before them."""
        largest = (MAX_UNTILED, MAX_UNTILED)
        workers = parallel_batches(self.job.defense.purifier, largest, self.job.batch_size, self.job.device)
        for large, found in groupby(grouped, lambda one: isinstance(one, FolderImage)):
            if large:
                yield from (self._purify_large(one) for one in found if isinstance(one, FolderImage))
            else:
                small = (one for one in found if not isinstance(one, FolderImage))
                yield from chain.from_iterable(parallel_map(self._prepare, self._compute, small, workers))

    def _prepare(self, found: Outcome | list[FolderImage]) -> Outcome | _Batch:
        return self._batch(found, self.job.batch_size) if isinstance(found, list) else found

    def _batch(self, group: list[FolderImage], size: int) -> _Batch:
        full = [group[min(i, len(group) - 1)] for i in range(size)]
        pixels = np.stack([one.pixels for one in full if one.pixels is not None])
        images = to_device(torch.from_numpy(pixels.astype(np.float32) / np.float32(255)), self.job.device)
        keys = [one.entry.file for one in full]
        noise = row_noise(self.job.defense.purifier, images, keys, seed=self.job.seed, purpose="purify")
        return _Batch(group, images, noise)

    def _compute(self, found: Outcome | _Batch) -> list[Outcome] | list[_Purified]:
        return self._purify_batch(found) if isinstance(found, _Batch) else [found]

    def _purify_batch(self, batch: _Batch) -> list[_Purified]:
        try:
            purified = self.job.purify(batch.images, batch.noise)
        except torch.OutOfMemoryError:
            size = len(batch.images)
            raise AdvdiffError(f"{size} images do not fit into memory together; give --batch-size auto") from None
        sizes = [one.size for one in batch.group]
        cropped = [image[:, :h, :w] for image, (h, w) in zip(purified, sizes, strict=False)]  # without the padding
        return [(one, (image * 255).round().byte().numpy()) for one, image in zip(batch.group, cropped, strict=True)]

    def _purify_large(self, image: FolderImage) -> Outcome:
        decoded = decode(image)
        if isinstance(decoded, Outcome):
            return decoded
        assert decoded.pixels is not None
        try:
            pixels = self.job.purify_large(decoded.pixels, image.entry.file, self.images.writer.out)
        except (MemoryError, torch.OutOfMemoryError):
            return image.failed(f"{image.file} does not fit into memory; cut it into tiles")
        return self.images.write(decoded, pixels)

    def _finish(self, found: Outcome | _Purified) -> Outcome:
        """Write a purified image, or record a failure in the journal."""
        return self.images.record(found if isinstance(found, Outcome) else self.images.write(*found))
