"""Read the images of a folder that are to be purified, in groups of one size, and write them.

Threads decode images before the computation, and encode and write them after it. An image that fails does not stop the
others. Large images are denoised in windows and would fill the memory: each is read when it is computed.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.folder_journal import FolderEntry, output_name
from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_files import Metadata, check_file, image_metadata, image_size, read_image
from advdiff_cli.data.patch_source import MIN_SIZE
from advdiff_cli.data.prefetch import prefetch
from advdiff_cli.data.provenance import file_digest
from advdiff_cli.errors import AdvdiffError, is_debugging
from advdiff_cli.purification.equations import MAX_UNTILED

THREADS = min(8, os.cpu_count() or 1)  # that read, decode, encode and write
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
class FolderImage:
    """An image with its own (H, W), metadata, and pixels (3, H', W') with H' and W' rounded up.

    A large image is read when it is computed, and has no pixels before.
    """

    file: Path
    entry: FolderEntry
    size: tuple[int, int]
    metadata: Metadata
    pixels: NDArray[np.uint8] | None = None

    def failed(self, reason: str) -> Outcome:
        """Return the outcome of an image that failed."""
        return Outcome(self.entry.file, "failed", reason, self.entry.sha256)


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder, and where they go.

    Args:
        root: The folder that names are relative to.
        writer: Where results and the journal go.
        batch_size: Images computed together.
    """

    root: Path
    writer: FolderWriter
    batch_size: int

    def load(self, files: Iterable[Path]) -> Iterator[Outcome | FolderImage]:
        """Yield the images of `files`, which are below the root, or the outcome of those that need no computation."""
        return prefetch(self._load, files, threads=THREADS, depth=self.batch_size)

    def _load(self, file: Path) -> Outcome | FolderImage:
        key, sha256 = file.relative_to(self.root).as_posix(), None
        try:
            check_file(file)
            sha256 = file_digest(file)
            entry = FolderEntry(key, sha256, output_name(key))
            if self.writer.is_done(entry):
                return Outcome(key, "kept")
            size = image_size(file) or (0, 0)  # decoding names the problem of an unreadable file
        except Exception as e:  # whatever one file raises is that file's failure; see describe
            return Outcome(key, "failed", describe(e, file), sha256)
        image = FolderImage(file, entry, size, {})
        return image if max(size) > MAX_UNTILED else decode(image)

    def write(self, image: FolderImage, pixels: NDArray[np.uint8]) -> Outcome:
        """Write purified pixels (3, H, W)."""
        try:
            self.writer.write(image.entry, pixels, image.metadata)
        except OSError:  # of the disk, which the next file would meet too
            raise
        except Exception as e:  # as in _load
            return image.failed(describe(e, image.file))
        return Outcome(image.entry.file, "ok")

    def record(self, outcome: Outcome) -> Outcome:
        """Record a failure in the journal."""
        if outcome.status == "failed":
            self.writer.record_failure(outcome.file, outcome.sha256, outcome.reason)
        return outcome


def describe(problem: Exception, file: Path) -> str:
    """Return why a file failed, since one file does not stop the others; a bug keeps its traceback for debugging."""
    if isinstance(problem, AdvdiffError):
        return str(problem)
    if is_debugging():
        raise problem
    if isinstance(problem, OSError) and problem.strerror:
        return f"{file} cannot be read ({problem.strerror})"
    return f"{file} cannot be read ({type(problem).__name__}: {problem})"


def decode(image: FolderImage) -> Outcome | FolderImage:
    """Return an image with its pixels and metadata, or the outcome of one that cannot be read."""
    try:
        pixels, metadata = read_image(image.file), image_metadata(image.file)
        height, width = pixels.shape[1:]
        if min(height, width) < MIN_SIZE:
            raise AdvdiffError(f"{image.file} is {height}x{width}; at least {MIN_SIZE}x{MIN_SIZE} is needed")
    except Exception as e:  # as in FolderImages._load
        return image.failed(describe(e, image.file))
    return replace(image, size=(height, width), metadata=metadata, pixels=_round_up(pixels))


def group_by_size(
    loaded: Iterable[Outcome | FolderImage], batch_size: int
) -> Iterator[Outcome | FolderImage | list[FolderImage]]:
    """Yield images of one size that fill a batch or have waited too long; large images and failures at once."""
    waiting: dict[tuple[int, ...], list[FolderImage]] = {}
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
