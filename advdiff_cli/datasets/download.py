"""Download PCam's files: fetch, verify size and hash, unpack as a stream, and rename when complete."""

import gzip
import hashlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
from filelock import FileLock

from advdiff_cli.data.pcam_files import SPLITS, pcam_folder, split_name
from advdiff_cli.datasets.http_client import DEFAULT_RETRIES, FetchError, RetryPolicy, fetch
from advdiff_cli.datasets.pcam import METADATA, REGISTRY, Registry, RemoteFile
from advdiff_cli.errors import AdvdiffError

_BLOCK = 1 << 20
_OVERHEAD = 16 << 20  # bytes by which an HDF5 file may exceed its datasets


@dataclass(frozen=True)
class Step:
    """What to do for one file: `have` (nothing), `unpack` or `fetch`; the bytes to fetch, and the target."""

    name: str
    remote: RemoteFile
    action: str
    to_fetch: int
    target: Path

    @property
    def served(self) -> Path:
        """The path of the file as served, gzipped or not."""
        return self.target.with_name(self.name)

    @property
    def part(self) -> Path:
        """The path of the incomplete download."""
        return self.target.with_name(self.name + ".part")


def plan(split: str, data_dir: Path, registry: Registry = REGISTRY | METADATA) -> list[Step]:
    """Return a step for each file of a split (or `all`), depending on which files exist.

    Raises:
        AdvdiffError: There is no such split.
    """
    wanted = SPLITS if split == "all" else (split_name(split),)
    folder = pcam_folder(data_dir)
    names = [name for name in registry if any(f"_{one}_" in name for one in wanted)]
    return [_step(name, registry[name], folder / name.removesuffix(".gz")) for name in names]


def _step(name: str, remote: RemoteFile, target: Path) -> Step:
    done = Step(name, remote, "have", 0, target)
    if is_complete(target, remote):
        return done
    packed = done.served != target and done.served.is_file() and done.served.stat().st_size == remote.size
    if packed:
        return Step(name, remote, "unpack", 0, target)
    begun = done.part.stat().st_size if done.part.is_file() else 0
    return Step(name, remote, "fetch", max((remote.size or 0) - begun, 0), target)


def is_complete(target: Path, remote: RemoteFile) -> bool:
    """Return whether a file is complete: its datasets have the right size, or the file the right hash."""
    if not target.is_file():
        return False
    if remote.unpacked is None:
        return remote.md5 is not None and hash_of(target, "md5") == remote.md5
    try:
        with h5py.File(target, "r") as file:
            return int(sum(d.nbytes for d in file.values())) == remote.unpacked
    except OSError:
        return False


def hash_of(path: Path, algorithm: str) -> str:
    """Return the hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def check_space(steps: Sequence[Step], data_dir: Path) -> None:
    """Check that the disk has space for the files, packed and unpacked.

    Raises:
        AdvdiffError: It has not.
    """
    need = sum(s.to_fetch + (s.remote.unpacked or 0) for s in steps if s.action != "have")
    existing = data_dir
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < need:
        raise AdvdiffError(
            f"{data_dir} has {free / 1e9:.1f} GB free and {need / 1e9:.1f} GB are needed; choose another --data-dir"
        )


def run(step: Step, mirror: str, *, keep_gz: bool = False, retries: RetryPolicy = DEFAULT_RETRIES) -> Iterator[int]:
    """Carry out a step, yielding the number of bytes of each block fetched.

    Where another process works on the same file, wait for it.

    Args:
        step: Of `plan`.
        mirror: URL of the folder that holds the files.
        keep_gz: Whether to keep the gzipped file.
        retries: How to deal with an unreliable mirror.

    Raises:
        AdvdiffError: The mirror fails (an incomplete download is kept), or it serves another file than expected.
    """
    if step.action == "have":
        return
    step.target.parent.mkdir(parents=True, exist_ok=True)
    lock = step.target.with_name(f".{step.target.name}.lock")
    with FileLock(lock):
        step = _step(step.name, step.remote, step.target)  # another process may have done it
        if step.action == "fetch":
            yield from _fetched(step, mirror, retries)
            _verify(step.part, step)
            step.part.rename(step.served)
        if step.action != "have" and step.served != step.target:
            if step.action == "unpack":  # the user's own download is kept
                _verify(step.served, step)
            _unpack(step)
            if step.action == "fetch" and not keep_gz:
                step.served.unlink()
        lock.unlink(missing_ok=True)


def _fetched(step: Step, mirror: str, retries: RetryPolicy) -> Iterator[int]:
    url = f"{mirror.rstrip('/')}/{step.name}?download=1"
    try:
        yield from fetch(url, step.part, step.remote.size, retries)
    except FetchError as e:
        known = ", ".join(f"{k} {v}" for k in ("size", "sha256", "md5") if (v := getattr(step.remote, k)))
        raise AdvdiffError(
            f"{step.name}: {e}; run the same command again to resume, or download it by hand: "
            f"curl -L -C - -A advdiff -o {step.served} '{url}' ({known.replace('size', 'bytes')})"
        ) from None


def _verify(path: Path, step: Step) -> None:
    """Check size and hash; a file with the wrong content is removed, since it cannot be resumed."""
    kind = "sha256" if step.remote.sha256 else "md5"
    have = hash_of(path, kind)
    if have != getattr(step.remote, kind) or step.remote.size not in (None, path.stat().st_size):
        path.unlink()
        raise AdvdiffError(
            f"{step.name} does not match the registry ({kind} {have}); it was removed, try another --mirror"
        )


def _unpack(step: Step) -> None:
    ceiling = (step.remote.unpacked or (step.remote.size or 0) * 100) + _OVERHEAD
    fresh = step.target.with_name(step.target.name + ".part")
    try:
        with gzip.open(step.served) as packed, fresh.open("wb") as file:
            while block := packed.read(_BLOCK):
                file.write(block)
                if file.tell() > ceiling:
                    raise AdvdiffError(f"{step.served} unpacks to more than {ceiling} bytes; it is not PCam's file")
        if step.remote.unpacked is not None and not is_complete(fresh, step.remote):
            raise AdvdiffError(f"{step.served} does not unpack to the expected datasets")
        fresh.rename(step.target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise AdvdiffError(f"{step.served} cannot be unpacked ({e})") from None
    finally:
        fresh.unlink(missing_ok=True)
