"""Purify in bulk, the next batch being read meanwhile: rows of a patch set, or a folder of images of any sizes.

Of a folder, images are batched by size, and one bad file never stops the rest.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.ahead import ahead
from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_folder import check_file, read_image, told_of
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.data.source import MIN_SIZE
from advdiff_cli.data.writer import Batch, PatchWriter
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import autocast, onto
from advdiff_cli.purification.defended import row_noise
from advdiff_cli.purification.purifier import Purifier
from advdiff_cli.purification.windows import LARGEST

_THREADS = 8  # at most, that read, decode, encode and write
_WAITING = 4  # batches' worth of images that may wait for company of their size
_SIZES = 32  # pixels: sizes are rounded up to multiples of it, so that images of many sizes fill batches


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `ok`, `kept` (done before) or `failed`, with the reason and the file's SHA-256."""

    file: str
    status: str
    reason: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class _Waiting:
    """An image, its size rounded up, that waits for company; its own (H, W), and what its file tells about it."""

    key: str
    sha256: str
    image: NDArray[np.uint8]
    size: tuple[int, ...]
    about: dict[str, Any]


@dataclass(frozen=True)
class _Purified:
    """An image to be written."""

    one: _Waiting
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class _Ready:
    """Images of one size, at most a batch, and what is computed: the last image repeated to the full batch."""

    group: list[_Waiting]
    images: Tensor
    noise: Tensor


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

    with sink:
        for batch, images, noise in ahead(read, sink.batches(batch_size)):
            sink.write(batch, purify_batch(purifier, images, noise, precision).numpy())
            yield batch.count


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

    def load(file: Path) -> Outcome | _Waiting:
        return _loaded(file, file.relative_to(root).as_posix(), names, writer)

    def ready(found: Outcome | list[_Waiting]) -> Outcome | _Ready:
        if isinstance(found, Outcome):
            return found
        full = [found[min(i, len(found) - 1)] for i in range(_at_once(found[0].image.shape, batch_size))]
        images = torch.from_numpy(np.stack([one.image for one in full]).astype(np.float32) / np.float32(255))
        noise = row_noise(purifier, images, [one.key for one in full], seed=seed, purpose="purify")
        return _Ready(found, onto(images, device), onto(noise, device))

    def purified() -> Iterator[Outcome | _Purified]:
        loaded = ahead(load, files, threads=threads, depth=batch_size)
        for found in ahead(ready, _gathered(loaded, batch_size)):
            if isinstance(found, Outcome):
                yield found
                continue
            clean = purify_batch(purifier, found.images, found.noise, precision)
            for one, image in zip(found.group, clean, strict=False):
                height, width = one.size
                yield _Purified(one, (image[:, :height, :width] * 255).round().byte().numpy())

    threads = min(_THREADS, os.cpu_count() or 1)
    yield from ahead(partial(_settled, writer, names), purified(), threads=threads, depth=2 * threads)


def _loaded(file: Path, key: str, names: Mapping[str, str], writer: FolderWriter) -> Outcome | _Waiting:
    sha256 = None
    try:
        check_file(file)
        sha256 = file_digest(file)
        if writer.is_done(key, sha256, names[key]):
            return Outcome(key, "kept")
        image, about = read_image(file), told_of(file)
        if min(image.shape[1:]) < MIN_SIZE:
            raise AdvdiffError(f"{file} is {image.shape[1]}x{image.shape[2]}; at least {MIN_SIZE}x{MIN_SIZE} is needed")
    except (AdvdiffError, OSError) as e:
        return Outcome(key, "failed", str(e), sha256)
    return _Waiting(key, sha256, _rounded(image), image.shape[1:], about)


def _gathered(loaded: Iterable[Outcome | _Waiting], batch_size: int) -> Iterator[Outcome | list[_Waiting]]:
    """Yield images of one size that fill a batch, or have waited for too long; and the files that are not computed."""
    waiting: dict[tuple[int, ...], list[_Waiting]] = {}
    for found in loaded:
        if isinstance(found, Outcome):
            yield found
            continue
        shape = found.image.shape
        waiting.setdefault(shape, []).append(found)
        if len(waiting[shape]) == _at_once(shape, batch_size):
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _settled(writer: FolderWriter, names: Mapping[str, str], found: Outcome | _Purified) -> Outcome:
    """Write a purified image, or note in the journal why there is none."""
    if isinstance(found, _Purified):
        one = found.one
        try:
            writer.write(one.key, one.sha256, names[one.key], found.image, one.about)
            return Outcome(one.key, "ok")
        except AdvdiffError as e:
            found = Outcome(one.key, "failed", str(e), one.sha256)
    if found.status == "failed":
        writer.fail(found.file, found.sha256, found.reason)
    return found


def _at_once(shape: tuple[int, ...], batch_size: int) -> int:
    return batch_size if max(shape) <= LARGEST else 1


def _rounded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (3, H, W) reflected beyond its lower and right borders to a size that others share.

    One that is denoised in windows is computed alone, and stays as it is.
    """
    if max(image.shape) > LARGEST:
        return image
    below, right = (-side % _SIZES for side in image.shape[1:])
    return np.pad(image, ((0, 0), (0, below), (0, right)), mode="reflect")
