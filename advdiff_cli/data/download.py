"""Fetch PCam's files: resumed by Range, verified by size and SHA-256, unpacked as a stream, renamed when whole."""

import gzip
import hashlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from ipaddress import ip_address
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import h5py

from advdiff_cli import __version__
from advdiff_cli.data.pcam import REGISTRY, SPLITS, Registry, RemoteFile, folder, split_name
from advdiff_cli.errors import AdvdiffError

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_OVERHEAD = 16 << 20  # bytes an HDF5 file may be larger than what it holds


@dataclass(frozen=True)
class Step:
    """What is to be done for one file: `have` (nothing), `unpack` or `fetch`, the bytes to come and where it goes."""

    name: str
    remote: RemoteFile
    action: str
    to_fetch: int
    target: Path

    @property
    def gz(self) -> Path:
        """Where the packed file lies."""
        return self.target.with_name(self.name)

    @property
    def part(self) -> Path:
        """Where the packed file grows."""
        return self.target.with_name(self.name + ".part")


def plan(split: str, data_dir: Path, registry: Registry = REGISTRY) -> list[Step]:
    """Return a step for each file of a split (or `all`), looking at what is there already.

    Raises:
        AdvdiffError: no such split.
    """
    wanted = SPLITS if split == "all" else (split_name(split),)
    place = folder(data_dir)
    steps = []
    for name, remote in registry.items():
        if any(f"_{one}_" in name for one in wanted):
            target = place / name.removesuffix(".gz")
            done = Step(name, remote, "have", 0, target)
            if _holds(target, remote):
                steps.append(done)
            elif done.gz.is_file() and done.gz.stat().st_size == remote.size:
                steps.append(Step(name, remote, "unpack", 0, target))
            else:
                begun = done.part.stat().st_size if done.part.is_file() else 0
                steps.append(Step(name, remote, "fetch", max(remote.size - begun, 0), target))
    return steps


def _holds(target: Path, remote: RemoteFile) -> bool:
    """Tell whether an unpacked file is there whole: it opens, and its dataset has the size it should have."""
    if not target.is_file():
        return False
    try:
        with h5py.File(target, "r") as file:
            return int(sum(d.nbytes for d in file.values())) == remote.unpacked
    except OSError:
        return False


def check_space(steps: Sequence[Step], data_dir: Path) -> None:
    """Check that the disk holds what is to come, packed and unpacked; AdvdiffError when not."""
    need = sum(s.to_fetch + (s.remote.unpacked or 0) for s in steps if s.action != "have")
    place = data_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise AdvdiffError(
            f"{data_dir} has {free / 1e9:.1f} GB free and {need / 1e9:.1f} GB are needed; choose another --data-dir"
        )


def run(step: Step, mirror: str) -> Iterator[int]:
    """Do a step, yielding the number of bytes fetched at a time.

    Raises:
        AdvdiffError: the mirror fails, or serves other bytes than the registry names; what was fetched stays.
    """
    step.target.parent.mkdir(parents=True, exist_ok=True)
    if step.action == "fetch":
        yield from _fetch(step, mirror)
        _verify(step.part, step)
        step.part.rename(step.gz)
        _unpack(step)
        step.gz.unlink()
    elif step.action == "unpack":  # somebody else's download: it stays
        _verify(step.gz, step)
        _unpack(step)


def _fetch(step: Step, mirror: str) -> Iterator[int]:
    url = f"{mirror.rstrip('/')}/{step.name}?download=1"
    _check_scheme(url)
    begun = step.part.stat().st_size if step.part.is_file() else 0
    if begun == step.remote.size:
        return
    headers = {"User-Agent": f"advdiff/{__version__}"}
    if 0 < begun < step.remote.size:
        headers["Range"] = f"bytes={begun}-"
    try:
        with build_opener(_SafeRedirects).open(Request(url, headers=headers), timeout=_TIMEOUT) as reply:
            resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
            with step.part.open("ab" if resumed else "wb") as file:
                yield from _copy(reply, file, step)
    except HTTPError as e:
        raise _failure(step, url, f"HTTP status {e.code}") from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as e:
        raise _failure(step, url, str(getattr(e, "reason", None) or e)) from None
    if (got := step.part.stat().st_size) < step.remote.size:
        raise _failure(step, url, f"the connection ended after {got} of {step.remote.size} bytes")


def _copy(reply: IO[bytes], file: IO[bytes], step: Step) -> Iterator[int]:
    while block := reply.read(_BLOCK):
        file.write(block)
        yield len(block)
        if file.tell() > step.remote.size:
            break  # more than the registry names: the check of the hash says so


def _failure(step: Step, url: str, reason: str) -> AdvdiffError:
    return AdvdiffError(
        f"{step.name}: {reason}; run the same command again to go on, or fetch it by hand: "
        f"curl -L -C - -A advdiff -o {step.gz} '{url}' ({step.remote.size} bytes, sha256 {step.remote.sha256})"
    )


def _verify(path: Path, step: Step) -> None:
    """Check size and SHA-256; a file that is not what the registry names is removed, for it cannot be resumed."""
    with path.open("rb") as file:
        have = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != step.remote.size or have != step.remote.sha256:
        path.unlink()
        raise AdvdiffError(
            f"{step.name} is not the file the registry names (sha256 {have}); it was removed, try another --mirror"
        )


def _unpack(step: Step) -> None:
    ceiling = (step.remote.unpacked or step.remote.size * 100) + _OVERHEAD
    fresh = step.target.with_name(step.target.name + ".part")
    try:
        with gzip.open(step.gz) as packed, fresh.open("wb") as file:
            while block := packed.read(_BLOCK):
                file.write(block)
                if file.tell() > ceiling:
                    raise AdvdiffError(f"{step.gz} unpacks to more than {ceiling} bytes; it is not PCam's file")
        if step.remote.unpacked is not None and not _holds(fresh, step.remote):
            raise AdvdiffError(f"{step.gz} does not unpack to the datasets the registry names")
        fresh.rename(step.target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise AdvdiffError(f"{step.gz} cannot be unpacked ({e})") from None
    finally:
        fresh.unlink(missing_ok=True)


def _check_scheme(url: str) -> None:
    """Check that a URL is https, or plain http to this machine; AdvdiffError when not."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise AdvdiffError(f"{url}: a mirror must be https; plain http is for this machine only")


class _SafeRedirects(HTTPRedirectHandler):
    """Follows redirects to where a mirror itself may lie, and nowhere else."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
