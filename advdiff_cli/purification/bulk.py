"""Purify a folder: images of any sizes, batched by size, one bad file never stopping the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.folder_writer import FolderWriter, output_names
from advdiff_cli.data.image_folder import read_image
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.data.source import MIN_SIZE
from advdiff_cli.data.streams import RowKey
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import autocast
from advdiff_cli.purification.defended import row_noise
from advdiff_cli.purification.purifier import Purifier

_WAITING = 4  # batches' worth of images that may wait for company of their size


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `ok`, `kept` (done before) or `failed`, with the reason."""

    file: str
    status: str
    reason: str = ""


@torch.inference_mode()
def purify_batch(
    purifier: Purifier, images: Tensor, keys: list[RowKey], seed: int, precision: str, device: torch.device
) -> Tensor:
    """Purify images (B, 3, H, W) in [0, 1], the noise of each drawn from the stream that its key names."""
    noise = row_noise(purifier, images, keys, seed=seed, purpose="purify")
    with autocast(precision, device):
        purified: Tensor = purifier(images.to(device), noise.to(device))
        return purified.float().cpu()


def purify_files(
    purifier: Purifier, root: Path, files: list[Path], writer: FolderWriter, *,
    batch_size: int, seed: int, precision: str, device: torch.device,
) -> Iterator[Outcome]:  # fmt: skip
    """Purify image files to the same relative names, yielding what became of each.

    Args:
        purifier: On `device`.
        root: What names are relative to; the relative name of a file names its noise.
        files: Image files below `root`.
        writer: Where results and the journal go.
        batch_size: Images of one size computed at once.
        seed: Of the noise.
        precision: fp32, bf16 or fp16.
        device: Where to compute.
    """
    names = output_names([f.relative_to(root).as_posix() for f in files])
    waiting: dict[tuple[int, ...], list[tuple[str, str, NDArray[np.uint8]]]] = {}

    def run(shape: tuple[int, ...]) -> Iterator[Outcome]:
        group = waiting.pop(shape)
        full = [group[min(i, len(group) - 1)] for i in range(batch_size)]
        images = torch.from_numpy(np.stack([image for _, _, image in full]).astype(np.float32) / np.float32(255))
        clean = purify_batch(purifier, images, [key for key, _, _ in full], seed, precision, device)
        for (key, sha256, _), image in zip(group, clean, strict=False):
            writer.write(key, sha256, names[key], (image * 255).round().byte().numpy())
            yield Outcome(key, "ok")

    for file in files:
        key = file.relative_to(root).as_posix()
        sha256 = None
        try:
            sha256 = file_digest(file)
            if writer.is_done(key, sha256, names[key]):
                yield Outcome(key, "kept")
                continue
            image = read_image(file)
            if min(image.shape[1:]) < MIN_SIZE:
                raise AdvdiffError(
                    f"{file} is {image.shape[1]}x{image.shape[2]}; at least {MIN_SIZE}x{MIN_SIZE} is needed"
                )
        except (AdvdiffError, OSError) as e:
            writer.fail(key, sha256, str(e))
            yield Outcome(key, "failed", str(e))
            continue
        waiting.setdefault(image.shape, []).append((key, sha256, image))
        if len(waiting[image.shape]) == batch_size:
            yield from run(image.shape)
        elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
            yield from run(max(waiting, key=lambda shape: len(waiting[shape])))
    for shape in list(waiting):
        yield from run(shape)
