"""download-pcam against a loopback server that serves real gzipped files."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import h5py
import pytest

from advdiff_cli.data import download
from advdiff_cli.data.pcam import REGISTRY, RemoteFile
from advdiff_cli.errors import AdvdiffError


class Mirror(SimpleHTTPRequestHandler):
    """Serves files with Range; `cut` ends a reply after that many bytes, `lie` serves other bytes."""

    cut = None
    lie = False
    seen: ClassVar[list] = []  # each server gets a class with a list of its own

    def do_GET(self):
        name = self.path.split("?")[0].lstrip("/")
        try:
            data = (self.directory / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        type(self).seen.append((name, start, self.headers["User-Agent"]))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        body = data[start:] if not self.lie else b"<html>" + data[start + 6 :]
        self.wfile.write(body[: self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(patches):
    handler = type("Handler", (Mirror,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler))
    handler.directory = property(lambda self: patches / "pcam", lambda self, value: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def registry(patches):
    known = {}
    for gz in sorted((patches / "pcam").glob("*.gz")):
        with h5py.File(gz.with_suffix("")) as h5:
            unpacked = sum(d.nbytes for d in h5.values())
        known[gz.name] = RemoteFile(gz.stat().st_size, hashlib.sha256(gz.read_bytes()).hexdigest(), unpacked)
    assert set(known) == set(REGISTRY)
    return known


def fetch(split, folder, url, registry):
    for step in download.plan(split, folder, registry):
        for _ in download.run(step, url):
            pass


def test_a_split_comes_whole_into_torchvisions_layout(tmp_path, mirror, registry, patches):
    url, handler = mirror
    fetch("test", tmp_path, url, registry)
    names = sorted(p.name for p in (tmp_path / "pcam").iterdir())
    assert names == [f"camelyonpatch_level_2_split_test_{k}.h5" for k in "xy"]
    for name in names:
        assert (tmp_path / "pcam" / name).read_bytes() == (patches / "pcam" / name).read_bytes()
    assert handler.seen[0][2].startswith("advdiff/")
    fetch("test", tmp_path, url, registry)
    assert len(handler.seen) == 2


def test_a_cut_download_is_resumed_by_range(tmp_path, mirror, registry):
    url, handler = mirror
    handler.cut = 1000
    with pytest.raises(AdvdiffError, match=r"connection|bytes.*curl -L -C -"):
        fetch("valid", tmp_path, url, registry)
    handler.cut = None
    fetch("valid", tmp_path, url, registry)
    starts = [start for name, start, _ in handler.seen if name.endswith("x.h5.gz")]
    assert starts == [0, 1000]


def test_other_bytes_are_not_kept(tmp_path, mirror, registry):
    url, handler = mirror
    handler.lie = True
    with pytest.raises(AdvdiffError, match="not the file the registry names"):
        fetch("test", tmp_path, url, registry)
    assert list((tmp_path / "pcam").iterdir()) == []


def test_a_missing_file_names_url_size_and_hash(tmp_path, mirror, registry):
    url, _ = mirror
    with pytest.raises(AdvdiffError, match=r"HTTP status 404.*bytes, sha256"):
        fetch("test", tmp_path, url + "/nowhere", registry)


def test_torchvisions_download_is_recognised(patches, registry):
    assert {s.action for s in download.plan("all", patches, registry)} == {"have"}


def test_packed_files_are_unpacked_and_kept(tmp_path, patches, registry):
    (tmp_path / "pcam").mkdir()
    for name in registry:
        if "_test_" in name:
            (tmp_path / "pcam" / name).write_bytes((patches / "pcam" / name).read_bytes())
    fetch("test", tmp_path, "https://nowhere.invalid", registry)
    assert len(list((tmp_path / "pcam").iterdir())) == 4


def test_plain_http_is_for_this_machine_only(tmp_path, registry):
    with pytest.raises(AdvdiffError, match="must be https"):
        fetch("test", tmp_path, "http://example.org", registry)


def test_a_full_disk_is_told_first(tmp_path, registry):
    huge = {name: RemoteFile(f.size, f.sha256, 1 << 60) for name, f in registry.items()}
    with pytest.raises(AdvdiffError, match="GB free"):
        download.check_space(download.plan("test", tmp_path, huge), tmp_path)


def test_dry_run_lists_the_official_files(advdiff, tmp_path):
    plan = advdiff("download-pcam", "--split", "test", "--data-dir", tmp_path, "--dry-run", "--json").json
    assert [f["bytes"] for f in plan["files"]] == [800_875_929, 3_040]
    assert list(tmp_path.iterdir()) == []
