"""Purify the rows of a patch set."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.output_spec import Batch
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.rng import row_stream
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.recipes import purify_recipe
from advdiff_cli.models.device import autocast, to_device
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.defense import Defense
from advdiff_cli.purification.large_images import purify_large_image


@dataclass(frozen=True)
class PurifyJob:
    """How patches are purified.

    Args:
        defense: The purifier, on `device`, and its settings.
        seed: Of the noise.
        batch_size: Patches computed together.
        precision: fp32, bf16 or fp16.
        device: Where to compute.
    """

    defense: Defense
    seed: int
    batch_size: int
    precision: Precision
    device: torch.device

    def recipe(self, patches: PatchSet | None = None) -> Provenance:
        """Return the recipe for a patch set, or for a folder of images."""
        spec, ddpm = self.defense.spec, self.defense.fingerprint
        settings = {"seed": self.seed, "batch_size": self.batch_size}
        return purify_recipe(spec, ddpm, patches, **settings, precision=self.precision)

    def purify_large(self, pixels: NDArray[np.uint8], name: str, folder: Path) -> NDArray[np.uint8]:
        """Purify a large image (3, H, W) whose noise is that of `name`, with memory that hardly grows with its size.

        Args:
            pixels: uint8 RGB.
            name: Its relative path.
            folder: Where unnamed temporary files lie.

        Raises:
            AdvdiffError: The result is not finite.
        """
        purifier, noise = self.defense.purifier, row_stream(self.seed, "purify", name)
        try:
            with autocast(self.precision, self.device):
                return purify_large_image(purifier, pixels, noise, self.device, folder)
        except FloatingPointError:
            raise self._not_finite() from None

    def _not_finite(self) -> AdvdiffError:
        advice = "give --precision fp32" if self.precision != "fp32" else "the diffusion model is damaged"
        return AdvdiffError(f"purified patches are not finite, because the U-Net overflowed; {advice}")

    @torch.inference_mode()
    def purify(self, images: Tensor, noise: Tensor) -> Tensor:
        """Purify a batch (B, 3, H, W) in [0, 1] with the given noise, both on the device; return it on the CPU.

        Raises:
            AdvdiffError: The result is not finite.
        """
        with autocast(self.precision, images.device):
            purified: Tensor = self.defense.purifier(images, noise)
        purified = purified.float().cpu()
        if not purified.isfinite().all():
            raise self._not_finite()
        return purified


def purify_rows(job: PurifyJob, patches: PatchSet, writer: PatchWriter) -> Iterator[int]:
    """Purify the rows that `writer` does not have yet, yielding the number of rows after each batch."""
    purifier = job.defense.purifier

    def read(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        images = to_device(patches.read(batch.rows), job.device)
        noise = row_noise(purifier, images, [patches.keys[i] for i in batch.rows], seed=job.seed, purpose="purify")
        return batch, images, noise

    def purify(one: tuple[Batch, Tensor, Tensor]) -> tuple[Batch, Tensor]:
        return one[0], job.purify(*one[1:])

    workers = parallel_batches(purifier, patches.require_shape(), job.batch_size, job.device)
    with writer:
        for batch, clean in parallel_map(read, purify, writer.batches(job.batch_size), workers):
            writer.write(batch, clean.numpy())
            yield batch.count
