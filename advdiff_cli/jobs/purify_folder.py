"""Purify a folder of images of any size, in batches by size; an image that fails does not stop the others.

Threads decode images before the computation, and encode and write them after it. Large images are denoised in windows
and would fill the memory: each is read, computed and written alone.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.data.folder_journal import FolderEntry, output_name
from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_files import Metadata, check_file, image_metadata, image_size, read_image
from advdiff_cli.data.patch_source import MIN_SIZE
from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.errors import AdvdiffError, is_debugging
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.purify_rows import PurifyJob
from advdiff_cli.models.device import to_device
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.tiling import MAX_UNTILED

_MAX_THREADS = 8  # that read, decode, encode and write
_MAX_WAITING = 4  # batches' worth of images that wait for others of their size
_SIZE_STEP = 32  # pixels: sizes are rounded up to multiples of it, so that images of many sizes fill batches


@dataclass(frozen=True)
class Outcome:
    """What happened to a file: `ok`, `kept` (done before) or `failed`, with the reason and the file's SHA-256."""

    file: str
    status: Literal["ok", "kept", "failed"]
    reason: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class _Image:
    """An image with its own (H, W), metadata, and pixels (3, H', W') with H' and W' rounded up.

    A large image is read when it is computed, and has no pixels before.
    """

    file: Path
    entry: FolderEntry
    size: tuple[int, int]
    metadata: Metadata
    pixels: NDArray[np.uint8] | None = None

    def failed(self, reason: str) -> Outcome:
        return Outcome(self.entry.file, "failed", reason, self.entry.sha256)


_Purified = tuple[_Image, NDArray[np.uint8]]
"""An image, and its purified pixels (3, H, W)."""


@dataclass(frozen=True)
class _Batch:
    """Images of one size, and the tensors to compute, in which the last image is repeated to a full batch."""

    group: list[_Image]
    images: Tensor
    noise: Tensor


@dataclass(frozen=True)
class FolderPurifier:
    """Purifies image files.

    Args:
        job: How.
        root: The folder that names are relative to; the relative name of a file names its noise.
        writer: Where results and the journal go.
    """

    job: PurifyJob
    root: Path
    writer: FolderWriter

    def run(self, files: Iterable[Path]) -> Iterator[Outcome]:
        """Yield the outcome of each of `files`, which are below the root."""
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        loaded = prefetch(self._load, files, threads=threads, depth=self.job.batch_size)
        grouped = _group_by_size(loaded, self.job.batch_size)
        yield from prefetch(self._finish, self._purify(grouped), threads=threads, depth=2 * threads)

    def _load(self, file: Path) -> Outcome | _Image:
        key, sha256 = file.relative_to(self.root).as_posix(), None
        try:
            check_file(file)
            sha256 = file_digest(file)
            entry = FolderEntry(key, sha256, output_name(key))
            if self.writer.is_done(entry):
                return Outcome(key, "kept")
            size = image_size(file) or (0, 0)  # decoding names the problem of an unreadable file
        except Exception as e:  # whatever one file raises is that file's failure; see _describe
            return Outcome(key, "failed", _describe(e, file), sha256)
        image = _Image(file, entry, size, {})
        return image if max(size) > MAX_UNTILED else _decode(image)

    def _purify(self, grouped: Iterable[Outcome | _Image | list[_Image]]) -> Iterator[Outcome | _Purified]:
        """Compute batches in parallel, and large images after the batches before them."""
        largest = (MAX_UNTILED, MAX_UNTILED)
        workers = parallel_batches(self.job.defense.purifier, largest, self.job.batch_size, self.job.device)
        for large, found in groupby(grouped, lambda one: isinstance(one, _Image)):
            if large:
                yield from (self._purify_large(one) for one in found if isinstance(one, _Image))
            else:
                small = (one for one in found if not isinstance(one, _Image))
                yield from chain.from_iterable(parallel_map(self._prepare, self._compute, small, workers))

    def _prepare(self, found: Outcome | list[_Image]) -> Outcome | _Batch:
        return self._batch(found, self.job.batch_size) if isinstance(found, list) else found

    def _batch(self, group: list[_Image], size: int) -> _Batch:
        full = [group[min(i, len(group) - 1)] for i in range(size)]
        pixels = np.stack([one.pixels for one in full if one.pixels is not None])
        images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))
        keys = [one.entry.file for one in full]
        noise = row_noise(self.job.defense.purifier, images, keys, seed=self.job.seed, purpose="purify")
        return _Batch(group, to_device(images, self.job.device), to_device(noise, self.job.device))

    def _compute(self, found: Outcome | _Batch) -> list[Outcome] | list[_Purified]:
        return self._purify_batch(found) if isinstance(found, _Batch) else [found]

    def _purify_batch(self, batch: _Batch) -> list[_Purified]:
        purified = self.job.purify(batch.images, batch.noise)
        sizes = [one.size for one in batch.group]
        cropped = [image[:, :h, :w] for image, (h, w) in zip(purified, sizes, strict=False)]  # without the padding
        return [(one, (image * 255).round().byte().numpy()) for one, image in zip(batch.group, cropped, strict=True)]

    def _purify_large(self, image: _Image) -> Outcome:
        decoded = _decode(image)
        if isinstance(decoded, Outcome):
            return decoded
        try:
            ((_, pixels),) = self._purify_batch(self._batch([decoded], 1))
        except (MemoryError, torch.OutOfMemoryError):
            return image.failed(
                f"{image.file} does not fit into memory; cut it into tiles, or give fewer --sampler-steps"
            )
        return self._write(decoded, pixels)

    def _write(self, image: _Image, pixels: NDArray[np.uint8]) -> Outcome:
        try:
            self.writer.write(image.entry, pixels, image.metadata)
        except OSError:  # of the disk, which the next file would meet too
            raise
        except Exception as e:  # as in _load
            return image.failed(_describe(e, image.file))
        return Outcome(image.entry.file, "ok")

    def _finish(self, found: Outcome | _Purified) -> Outcome:
        """Write a purified image, or record a failure in the journal."""
        outcome = found if isinstance(found, Outcome) else self._write(*found)
        if outcome.status == "failed":
            self.writer.record_failure(outcome.file, outcome.sha256, outcome.reason)
        return outcome


def _describe(problem: Exception, file: Path) -> str:
    """Return why a file failed, since one file does not stop the others; a bug keeps its traceback for debugging."""
    if isinstance(problem, AdvdiffError):
        return str(problem)
    if is_debugging():
        raise problem
    if isinstance(problem, OSError) and problem.strerror:
        return f"{file} cannot be read ({problem.strerror})"
    return f"{file} cannot be read ({type(problem).__name__}: {problem})"


def _decode(image: _Image) -> Outcome | _Image:
    try:
        pixels, metadata = read_image(image.file), image_metadata(image.file)
        height, width = pixels.shape[1:]
        if min(height, width) < MIN_SIZE:
            raise AdvdiffError(f"{image.file} is {height}x{width}; at least {MIN_SIZE}x{MIN_SIZE} is needed")
    except Exception as e:  # as in FolderPurifier._load
        return image.failed(_describe(e, image.file))
    return replace(image, size=(height, width), metadata=metadata, pixels=_round_up(pixels))


def _group_by_size(loaded: Iterable[Outcome | _Image], batch_size: int) -> Iterator[Outcome | _Image | list[_Image]]:
    """Yield images of one size that fill a batch or have waited too long; large images and failures at once."""
    waiting: dict[tuple[int, ...], list[_Image]] = {}
    for found in loaded:
        if isinstance(found, Outcome) or found.pixels is None:
            yield found
            continue
        shape = found.pixels.shape
        waiting.setdefault(shape, []).append(found)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _MAX_WAITING * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _round_up(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pad an image (3, H, W) by reflection at the bottom and right to a rounded size; large images stay as they are."""
    if max(image.shape) > MAX_UNTILED:
        return image
    bottom, right = (-side % _SIZE_STEP for side in image.shape[1:])
    return np.pad(image, ((0, 0), (0, bottom), (0, right)), mode="reflect")
