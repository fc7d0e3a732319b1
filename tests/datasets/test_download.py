"""download-pcam against a loopback server that serves real gzipped files."""

import hashlib
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import h5py
import pytest
import torch
from torchvision.datasets import PCAM
from torchvision.transforms.functional import pil_to_tensor

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.pcam_files import PREFIX, SPLITS
from advdiff_cli.datasets import download
from advdiff_cli.datasets.http_client import RetryPolicy
from advdiff_cli.datasets.pcam import METADATA, REGISTRY, RemoteFile
from advdiff_cli.datasets.verify import verify
from advdiff_cli.errors import AdvdiffError


class Mirror(SimpleHTTPRequestHandler):
    """Serves files with Range, and misbehaves as its `faults`, one a request, say."""

    faults: ClassVar[list] = []  # each server gets a class with lists of its own
    seen: ClassVar[list] = []

    def do_GET(self):
        name = self.path.split("?")[0].lstrip("/")
        fault = type(self).faults.pop(0) if type(self).faults else ""
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        type(self).seen.append((name, start, self.headers["User-Agent"]))
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Retry-After", "7") if fault == "429" else None
            self.end_headers()
            return
        try:
            data = (self.directory / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        data = {"other bytes": data[:-1] + b"?", "page": b"<html>quota</html>"}.get(fault, data)
        if fault == "no range":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if fault == "page" else "application/gzip")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if fault == "trickle":
            for byte in data[start : start + 20]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.03)
        else:
            self.wfile.write(data[start:][: 1000 if fault == "cut" else None])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(patches):
    handler = type("Handler", (Mirror,), {"seen": [], "faults": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler))
    handler.directory = property(lambda self: patches / "pcam", lambda self, value: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def registry(patches):
    """The record of the served files, with slide names, which the small files do not have, made up beside them."""
    known = {}
    for gz in sorted((patches / "pcam").glob("*.gz")):
        with h5py.File(gz.with_suffix("")) as h5:
            unpacked = sum(d.nbytes for d in h5.values())
        md5 = hashlib.md5(gz.with_suffix("").read_bytes()).hexdigest()
        sha256 = hashlib.sha256(gz.read_bytes()).hexdigest()
        known[gz.name] = RemoteFile(gz.stat().st_size, sha256, unpacked, md5)
    assert set(known) == set(REGISTRY)
    for name in METADATA:
        split = name.split("_")[4]
        with h5py.File(patches / "pcam" / f"{PREFIX}_{split}_y.h5") as h5:
            truth = h5["y"][:].reshape(-1)
        kind = "test" if split == "test" else "train"
        rows = [f"{i},0,0,{bool(y)},{bool(y)},camelyon16_{kind}_tumor_{i % 3:03}" for i, y in enumerate(truth)]
        text = "\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *rows]) + "\n"
        (patches / "pcam" / name).write_text(text)
        known[name] = RemoteFile(None, md5=hashlib.md5(text.encode()).hexdigest())
    return known


def fetch(split, folder, url, registry, **options):
    waits = []
    patience = RetryPolicy(timeout=0.2, min_bytes=4096, progress=900, sleep=waits.append)
    for step in download.plan(split, folder, registry):
        for _ in download.run(step, url, retries=patience, **options):
            pass
    return waits


def test_a_split_comes_whole_into_torchvisions_layout(tmp_path, mirror, registry, patches):
    url, handler = mirror
    fetch("test", tmp_path, url, registry)
    names = sorted(p.name for p in (tmp_path / "pcam").iterdir())
    assert names == sorted(f"{PREFIX}_test_{k}" for k in ("x.h5", "y.h5", "meta.csv"))
    for name in names:
        assert (tmp_path / "pcam" / name).read_bytes() == (patches / "pcam" / name).read_bytes()
    assert handler.seen[0][2].startswith("advdiff/")
    fetch("test", tmp_path, url, registry)
    assert len(handler.seen) == 3


def test_torchvision_reads_what_was_downloaded(tmp_path, mirror, registry):
    fetch("valid", tmp_path, mirror[0], registry)
    theirs, ours = PCAM(tmp_path, split="val", download=False), open_patches(tmp_path, split="val")
    assert len(theirs) == len(ours)
    image, label = theirs[3]
    assert torch.equal(pil_to_tensor(image) / 255, ours.read([3])[0])
    assert label == ours.labels[3]


@pytest.mark.parametrize(
    ("faults", "starts", "waits"),
    [
        (["cut"], [0, 1000], [2]),
        (["cut", "cut", "cut"], [0, 1000, 2000, 3000], [2, 2, 2]),  # each went on: none is counted against it
        (["cut", "no range"], [0, 1000], [2]),
        (["503", "502", "500"], [0] * 4, [2, 4, 8]),
        (["429", "429"], [0] * 3, [7, 7]),
        (["trickle"], [0, None], [2]),
    ],
)
def test_trouble_that_passes(tmp_path, mirror, registry, patches, faults, starts, waits):
    url, handler = mirror
    handler.faults += faults
    assert fetch("test", tmp_path, url, registry) == waits
    asked = [start for name, start, _ in handler.seen if name.endswith("x.h5.gz")]
    assert [a if b is not None else None for a, b in zip(asked, starts, strict=True)] == starts
    for name in (f"{PREFIX}_test_x.h5", f"{PREFIX}_test_y.h5"):
        assert (tmp_path / "pcam" / name).read_bytes() == (patches / "pcam" / name).read_bytes()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (["other bytes"], "does not match the registry"),
        (["cut", "other bytes"], "does not match the registry"),  # it changed midway
        (["page"], r"the server has 18 bytes of text/html, not \d+; .*curl -L -C -"),
        (["404"], "HTTP status 404"),
        (["503"] * 6, r"HTTP status 503; run the same command again .*bytes \d+, sha256"),
    ],
)
def test_trouble_that_stays(tmp_path, mirror, registry, faults, says):
    url, handler = mirror
    handler.faults += faults
    with pytest.raises(AdvdiffError, match=says):
        fetch("test", tmp_path, url, registry)
    assert not [p for p in (tmp_path / "pcam").iterdir() if not p.name.startswith(".")]
    fetch("test", tmp_path, url, registry)


def test_two_processes_fetch_a_file_once(tmp_path, mirror, registry):
    url, handler = mirror
    handler.faults += ["trickle"]
    threads = [threading.Thread(target=fetch, args=("test", tmp_path, url, registry)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len([name for name, _, _ in handler.seen if name.endswith("x.h5.gz")]) == 2
    )  # the one that stalled, and its retry
    assert len([p for p in (tmp_path / "pcam").iterdir() if not p.name.startswith(".")]) == 3


def test_packed_files_can_be_kept(tmp_path, mirror, registry):
    fetch("test", tmp_path, mirror[0], registry, keep_gz=True)
    assert len(list((tmp_path / "pcam").glob("*.gz"))) == 2


def test_a_folder_is_checked(tmp_path, mirror, registry):
    fetch("all", tmp_path, mirror[0], registry)
    place = tmp_path / "pcam"

    def found(*splits):
        return {(f.file.removeprefix(f"{PREFIX}_"), f.what): f for f in verify(splits or SPLITS, tmp_path, registry)}

    good = found()
    assert {f.status for k, f in good.items() if k[1] in ("hash", "shapes", "slides", "rows")} == {"pass"}
    assert {f.status for k, f in good.items() if k[1] == "duplicates"} == {"pass"}
    assert all(
        "0 rows differ from y.h5" in f.found for k, f in good.items() if k[0].endswith("meta.csv") and k[1] == "labels"
    )
    (place / f"{PREFIX}_valid_x.h5").write_bytes((place / f"{PREFIX}_test_x.h5").read_bytes())
    (place / f"{PREFIX}_valid_meta.csv").write_bytes((place / f"{PREFIX}_test_meta.csv").read_bytes())
    with h5py.File(place / f"{PREFIX}_train_x.h5", "r+") as file:
        file["x"][5] = file["x"][3]
    with h5py.File(place / f"{PREFIX}_train_y.h5", "r+") as file:
        file["y"][:] = 1
    bad = found()
    assert bad["valid_x.h5", "hash"].status == bad["valid_meta.csv", "hash"].status == "fail"
    assert "slides of another split" in bad["valid_meta.csv", "slides"].found
    n = len(open_patches(place / f"{PREFIX}_test_x.h5"))
    assert f"1 of {n} patches repeat an earlier one" in bad["train_x.h5", "duplicates"].found
    assert bad["test_x.h5", "duplicates"].found.endswith(f"{n} repeat one of another split")
    assert bad["train_y.h5", "labels"].status == "warn"
    (place / f"{PREFIX}_test_y.h5").unlink()
    assert found("test")["test_y.h5", "hash"].found == "is missing"
    with pytest.raises(AdvdiffError, match="holds no PCam files"):
        list(verify(("test",), tmp_path / "nowhere", registry))


def test_check_is_a_command(advdiff, patches, registry):
    command = ["download-pcam", "--split", "test", "--data-dir", patches, "--check"]
    ended = advdiff(*command, "--json", code=1)  # small files are not the official ones
    checks = {(c["file"], c["what"]): c["status"] for c in ended.json["checks"]}
    assert checks[f"{PREFIX}_test_x.h5", "hash"] == "fail"
    assert checks[f"{PREFIX}_test_x.h5", "shapes"] == "pass"
    assert "checks of" in ended.err


def test_torchvisions_download_is_recognised(patches, registry):
    assert {s.action for s in download.plan("all", patches, registry)} == {"have"}


def test_packed_files_are_unpacked_and_kept(tmp_path, patches, registry):
    (tmp_path / "pcam").mkdir()
    for name in registry:
        if "_test_" in name:  # slide names too: nothing is fetched
            (tmp_path / "pcam" / name).write_bytes((patches / "pcam" / name).read_bytes())
    fetch("test", tmp_path, "https://nowhere.invalid", registry)
    assert len(list((tmp_path / "pcam").iterdir())) == 5


def test_plain_http_is_for_this_machine_only(tmp_path, registry):
    with pytest.raises(AdvdiffError, match="must use https"):
        fetch("test", tmp_path, "http://example.org", registry)


def test_a_full_disk_is_told_first(tmp_path, registry):
    huge = {name: RemoteFile(f.size, f.sha256, 1 << 60) for name, f in registry.items()}
    with pytest.raises(AdvdiffError, match="GB free"):
        download.check_space(download.plan("test", tmp_path, huge), tmp_path)


def test_dry_run_lists_the_official_files(advdiff, tmp_path):
    plan = advdiff("download-pcam", "--split", "test", "--data-dir", tmp_path, "--dry-run", "--json").json
    assert [f["bytes"] for f in plan["files"]] == [800_875_929, 3_040, 0]
    assert list(tmp_path.iterdir()) == []
