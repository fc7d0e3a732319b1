"""Purify a folder: images of any sizes, batched by size, one bad file never stopping the rest.

Threads decode images ahead of the computation, and encode and write them behind it. Large images, which are denoised in
windows, would fill the memory so: each is read, computed and written alone.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_folder import check_file, image_size, read_image, told_of
from advdiff_cli.data.patch_source import MIN_SIZE
from advdiff_cli.data.prefetch import ahead
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.memory import batches_that_fit
from advdiff_cli.jobs.purify_rows import purify_batch
from advdiff_cli.models.device import onto, spread
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.purifier import Purifier
from advdiff_cli.purification.tiling import LARGEST

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
class _Image:
    """An image of a folder: its own (H, W), what its file tells about it, and pixels (3, H', W'), H' and W' rounded up.

    A large one has no pixels until its turn.
    """

    file: Path
    key: str
    sha256: str
    size: tuple[int, int]
    about: dict[str, Any]
    pixels: NDArray[np.uint8] | None = None


_Pixels = tuple[_Image, NDArray[np.uint8]]
"""An image, and the pixels (3, H, W) to be written of it."""


@dataclass(frozen=True)
class _Ready:
    """Images of one size, at most a batch, and what is computed: the last image repeated to the full batch."""

    group: list[_Image]
    images: Tensor
    noise: Tensor


@dataclass(frozen=True)
class FilesPurifier:
    """Purifies image files to the same relative names.

    Args:
        purifier: On `device`.
        root: What names are relative to; the relative name of a file names its noise.
        names: The output's relative name for each relative name.
        writer: Where results and the journal go.
        batch_size: Images of one size, rounded up, computed at once; a large one is computed alone.
        seed: Of the noise.
        precision: fp32, bf16 or fp16.
        device: Where to compute.
    """

    purifier: Purifier
    root: Path
    names: Mapping[str, str]
    writer: FolderWriter
    batch_size: int
    seed: int
    precision: str
    device: torch.device

    def run(self, files: Iterable[Path]) -> Iterator[Outcome]:
        """Yield what became of each of `files`, image files below the root."""
        threads = min(_THREADS, os.cpu_count() or 1)
        loaded = ahead(self._load, files, threads=threads, depth=self.batch_size)
        gathered = _gathered(loaded, self.batch_size)
        yield from ahead(self._settle, self._purified(gathered), threads=threads, depth=2 * threads)

    def _load(self, file: Path) -> Outcome | _Image:
        key, sha256 = file.relative_to(self.root).as_posix(), None
        try:
            check_file(file)
            sha256 = file_digest(file)
            if self.writer.is_done(key, sha256, self.names[key]):
                return Outcome(key, "kept")
            size = image_size(file) or (0, 0)  # what cannot be read is named as it is decoded
        except (AdvdiffError, OSError) as e:
            return Outcome(key, "failed", str(e), sha256)
        one = _Image(file, key, sha256, size, {})
        return one if max(size) > LARGEST else _decoded(one)

    def _ready(self, found: Outcome | list[_Image]) -> Outcome | _Ready:
        return self._batch(found, self.batch_size) if isinstance(found, list) else found

    def _batch(self, group: list[_Image], size: int) -> _Ready:
        full = [group[min(i, len(group) - 1)] for i in range(size)]
        pixels = np.stack([one.pixels for one in full if one.pixels is not None])
        images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))
        noise = row_noise(self.purifier, images, [one.key for one in full], seed=self.seed, purpose="purify")
        return _Ready(group, onto(images, self.device), onto(noise, self.device))

    def _computed(self, found: Outcome | _Ready) -> list[Outcome] | list[_Pixels]:
        return self._clean(found) if isinstance(found, _Ready) else [found]

    def _purified(self, gathered: Iterable[Outcome | _Image | list[_Image]]) -> Iterator[Outcome | _Pixels]:
        """Compute batches side by side, and large images when those before them are done."""
        at_once = batches_that_fit(self.purifier, LARGEST, LARGEST, self.batch_size, self.device)
        for large, found in groupby(gathered, lambda one: isinstance(one, _Image)):
            if large:
                yield from (self._alone(one) for one in found if isinstance(one, _Image))
            else:
                small = (one for one in found if not isinstance(one, _Image))
                yield from chain.from_iterable(spread(self._ready, self._computed, small, at_once))

    def _clean(self, batch: _Ready) -> list[_Pixels]:
        clean = purify_batch(self.purifier, batch.images, batch.noise, self.precision)
        sizes = [one.size for one in batch.group]
        cut = [image[:, :h, :w] for image, (h, w) in zip(clean, sizes, strict=False)]  # the last may be there again
        return [(one, (image * 255).round().byte().numpy()) for one, image in zip(batch.group, cut, strict=True)]

    def _alone(self, one: _Image) -> Outcome:
        decoded = _decoded(one)
        if isinstance(decoded, Outcome):
            return decoded
        try:
            ((_, pixels),) = self._clean(self._batch([decoded], 1))
        except (MemoryError, torch.OutOfMemoryError):
            why = f"{one.file} does not fit memory at so many steps; cut it into tiles, or give fewer --sampler-steps"
            return Outcome(one.key, "failed", why, one.sha256)
        return self._write(decoded, pixels)

    def _write(self, one: _Image, pixels: NDArray[np.uint8]) -> Outcome:
        try:
            self.writer.write(one.key, one.sha256, self.names[one.key], pixels, one.about)
        except AdvdiffError as e:
            return Outcome(one.key, "failed", str(e), one.sha256)
        return Outcome(one.key, "ok")

    def _settle(self, found: Outcome | _Pixels) -> Outcome:
        """Write what was computed, and note in the journal what failed."""
        outcome = found if isinstance(found, Outcome) else self._write(*found)
        if outcome.status == "failed":
            self.writer.fail(outcome.file, outcome.sha256, outcome.reason)
        return outcome


def _decoded(one: _Image) -> Outcome | _Image:
    try:
        pixels, about = read_image(one.file), told_of(one.file)
        height, width = pixels.shape[1:]
        if min(height, width) < MIN_SIZE:
            raise AdvdiffError(f"{one.file} is {height}x{width}; at least {MIN_SIZE}x{MIN_SIZE} is needed")
    except (AdvdiffError, OSError) as e:
        return Outcome(one.key, "failed", str(e), one.sha256)
    return replace(one, size=(height, width), about=about, pixels=_rounded(pixels))


def _gathered(loaded: Iterable[Outcome | _Image], batch_size: int) -> Iterator[Outcome | _Image | list[_Image]]:
    """Yield images of one size that fill a batch, or have waited for too long; large ones and failures as they come."""
    waiting: dict[tuple[int, ...], list[_Image]] = {}
    for found in loaded:
        if isinstance(found, Outcome) or found.pixels is None:
            yield found
            continue
        shape = found.pixels.shape
        waiting.setdefault(shape, []).append(found)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _rounded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (3, H, W) reflected beyond its lower and right borders to a size that others share.

    One that is denoised in windows is computed alone, and stays as it is.
    """
    if max(image.shape) > LARGEST:
        return image
    below, right = (-side % _SIZES for side in image.shape[1:])
    return np.pad(image, ((0, 0), (0, below), (0, right)), mode="reflect")
