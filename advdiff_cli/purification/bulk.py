"""Purify a folder: images of any sizes, batched by size, one bad file never stopping the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_folder import check_file, read_image, told_of
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.data.source import MIN_SIZE
from advdiff_cli.data.streams import RowKey
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import autocast
from advdiff_cli.purification.defended import row_noise
from advdiff_cli.purification.purifier import Purifier
from advdiff_cli.purification.windows import LARGEST

_WAITING = 4  # batches' worth of images that may wait for company of their size
_SIZES = 32  # pixels: sizes are rounded up to multiples of it, so that images of many sizes fill batches


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `ok`, `kept` (done before) or `failed`, with the reason."""

    file: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class _Waiting:
    """An image, its size rounded up, that waits for company; its own (H, W), and what its file tells about it."""

    key: str
    sha256: str
    image: NDArray[np.uint8]
    size: tuple[int, ...]
    about: dict[str, Any]


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
    purifier: Purifier, root: Path, files: list[Path], names: Mapping[str, str], writer: FolderWriter, *,
    batch_size: int, seed: int, precision: str, device: torch.device,
) -> Iterator[Outcome]:  # fmt: skip
    """Purify image files to the same relative names, yielding what became of each.

    Args:
        purifier: On `device`.
        root: What names are relative to; the relative name of a file names its noise.
        files: Image files below `root`.
        names: The output's relative name for each relative name.
        writer: Where results and the journal go.
        batch_size: Images of one size, rounded up, computed at once; one denoised in windows is computed alone.
        seed: Of the noise.
        precision: fp32, bf16 or fp16.
        device: Where to compute.
    """
    waiting: dict[tuple[int, ...], list[_Waiting]] = {}

    def failed(key: str, sha256: str | None, why: Exception) -> Outcome:
        writer.fail(key, sha256, str(why))
        return Outcome(key, "failed", str(why))

    def at_once(shape: tuple[int, ...]) -> int:
        return batch_size if max(shape) <= LARGEST else 1

    def run(shape: tuple[int, ...]) -> Iterator[Outcome]:
        group = waiting.pop(shape)
        full = [group[min(i, len(group) - 1)] for i in range(at_once(shape))]
        images = torch.from_numpy(np.stack([one.image for one in full]).astype(np.float32) / np.float32(255))
        clean = purify_batch(purifier, images, [one.key for one in full], seed, precision, device)
        for one, image in zip(group, clean, strict=False):
            height, width = one.size
            pixels = (image[:, :height, :width] * 255).round().byte().numpy()
            try:
                writer.write(one.key, one.sha256, names[one.key], pixels, one.about)
            except AdvdiffError as e:
                yield failed(one.key, one.sha256, e)
            else:
                yield Outcome(one.key, "ok")

    for file in files:
        key = file.relative_to(root).as_posix()
        sha256 = None
        try:
            check_file(file)
            sha256 = file_digest(file)
            if writer.is_done(key, sha256, names[key]):
                yield Outcome(key, "kept")
                continue
            image, about = read_image(file), told_of(file)
            if min(image.shape[1:]) < MIN_SIZE:
                raise AdvdiffError(
                    f"{file} is {image.shape[1]}x{image.shape[2]}; at least {MIN_SIZE}x{MIN_SIZE} is needed"
                )
        except (AdvdiffError, OSError) as e:
            yield failed(key, sha256, e)
            continue
        image, size = _rounded(image), image.shape[1:]
        waiting.setdefault(image.shape, []).append(_Waiting(key, sha256, image, size, about))
        if len(waiting[image.shape]) == at_once(image.shape):
            yield from run(image.shape)
        elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
            yield from run(max(waiting, key=lambda shape: len(waiting[shape])))
    for shape in list(waiting):
        yield from run(shape)


def _rounded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (3, H, W) reflected beyond its lower and right borders to a size that others share.

    One that is denoised in windows is computed alone, and stays as it is.
    """
    if max(image.shape) > LARGEST:
        return image
    below, right = (-side % _SIZES for side in image.shape[1:])
    return np.pad(image, ((0, 0), (0, below), (0, right)), mode="reflect")
