"""Files that lie: read correctly or refused in one line, never followed, executed, or allocated for.

A mutated file is read in a process of its own, with little memory and a time limit, so that a crash or a hang is seen.
"""

import io
import json
import os
import pickle
import struct
import traceback
import warnings

import h5py
import numpy as np
import pytest
from confined import ends
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from advdiff_cli.data.image_files import read_image
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.selection import Selection
from advdiff_cli.errors import AdvdiffError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 3, 40, 32), np.uint8)
VECTORS = {"labels": np.array([0, 1, 0]), "index": np.array([5, 6, 9]), "origin_sha256": np.eye(3, 32, dtype=np.uint8)}
MADE = json.dumps({"recipe": {"command": "test", "parameters": {}}, "inputs": [], "part": [0, 3, 5]})


def hdf5(**options):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("images", data=IMAGES, **options)
        for name, vector in VECTORS.items():
            file[name] = vector
        file["advdiff"] = MADE
    return buffer.getvalue()


def pcam():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("x", data=IMAGES.transpose(0, 2, 3, 1))
    return buffer.getvalue()


def safetensors(tmp_path):
    save_file({"images": IMAGES, **VECTORS}, tmp_path / "s", {"advdiff": MADE})
    return (tmp_path / "s").read_bytes()


def picture(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0].transpose(1, 2, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def straight(path):
    """Return what other readers make of a file that was not refused."""
    if path.suffix == ".safetensors":
        return load_file(path)["images"]
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            return file["images"][()] if "images" in file else file["x"][()].transpose(0, 3, 1, 2)
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]


def attempt(path):
    """Read all there is in a set; return how it ended."""
    try:
        found = open_patches(path)
        images = found.read(np.arange(len(found))).numpy()
        found.fingerprint(), found.origins()
    except AdvdiffError as e:
        return "refused" if str(path) in str(e) and "\n" not in str(e) else f"does not name the file: {e}"
    except BaseException:
        return traceback.format_exc()
    expected = straight(path)
    scale = 255 if expected.dtype == np.uint8 else 1
    return "read" if np.array_equal(images, (expected / np.float32(scale)).astype(np.float32)) else "read otherwise"


pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, which main() leaves out

FORMS = {
    "plain.h5": lambda tmp: hdf5(chunks=(1, 3, 40, 32)),
    "gzip.h5": lambda tmp: hdf5(chunks=(2, 3, 40, 32), compression="gzip", shuffle=True, fletcher32=True),
    "contiguous.h5": lambda tmp: hdf5(),
    "pcam_x.h5": lambda tmp: pcam(),
    "a.safetensors": safetensors,
    "a.png": lambda tmp: picture("PNG"),
    "a.jpg": lambda tmp: picture("JPEG"),
    "a.tif": lambda tmp: picture("TIFF", compression="tiff_deflate"),
    "b.tif": lambda tmp: picture("TIFF"),
    "a.bmp": lambda tmp: picture("BMP"),
}
CHANGE = st.tuples(
    st.floats(0, 1),  # where: half of the changes near the start, where headers are
    st.sampled_from(["flip", "set", "cut", "double", "number"]),
    st.integers(0, 2**63 - 1),
)


def mutate(data, changes):
    data = bytearray(data)
    for where, kind, value in changes:
        at = int((2 * where) * min(400, len(data))) if where < 0.5 else int((2 * where - 1) * len(data))
        at = min(at, len(data) - 1)
        if kind == "flip":
            data[at] ^= 1 << value % 8
        elif kind == "set":
            data[at] = value % 256
        elif kind == "cut":
            del data[at : at + value % 64 + 1]
        elif kind == "double":
            data[at:at] = data[at : at + value % 64 + 1]
        else:
            data[at : at + 8] = struct.pack("<Q", value)
        if not data:
            return b""
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_mutated_file_is_read_or_refused(name, tmp_path):
    whole, seen = FORMS[name](tmp_path), set()
    (tmp_path / name).write_bytes(whole)
    assert attempt(tmp_path / name) == "read"

    @settings(max_examples=int(os.environ.get("ADVDIFF_FUZZ", "25")), deadline=None, derandomize=True, database=None)
    @given(st.lists(CHANGE, min_size=1, max_size=4))
    def run(changes):
        (tmp_path / name).write_bytes(mutate(whole, changes))
        told = ends(lambda: attempt(tmp_path / name))
        assert told in ("read", "refused"), told
        seen.add(told)

    run()
    assert "refused" in seen


BOMB = (10**6, 3, 4096, 4096)


def bomb(path, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", BOMB, np.uint8, chunks=(1, 3, 256, 256), **options)


def bomb_of_labels(path):
    with h5py.File(path, "w") as file:
        file["images"] = IMAGES
        file.create_dataset("labels", (10**12,), np.int64, chunks=(1024,))


def one_image_too_large(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (1, 3, 10**5, 10**5), np.uint8, chunks=(1, 1, 1000, 1000), compression="gzip")
        for i in range(60):
            file["images"][0, 0, :1000, i * 1000 : (i + 1) * 1000] = RNG.integers(0, 256, (1000, 1000), np.uint8)


def virtual(path):
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["images"] = IMAGES
    layout = h5py.VirtualLayout(IMAGES.shape, np.uint8)
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "images", IMAGES.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("images", layout)


def soft_link(path):
    with h5py.File(path, "w") as file:
        file["hidden"] = IMAGES
        file["images"] = h5py.SoftLink("/hidden")


def lying_header(path, **changes):
    header = {"images": {"dtype": "U8", "shape": list(IMAGES.shape), "data_offsets": [0, IMAGES.nbytes], **changes}}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + IMAGES.tobytes())


def pickled(path):
    path.write_bytes(pickle.dumps(Boom()))


class Boom:
    def __reduce__(self):
        return os.system, ("touch executed",)


def record(path, text):
    save_file({"images": IMAGES, **VECTORS}, path, {"advdiff": text})


HOSTILE = {
    "a shape bomb": ("a.h5", bomb),
    "a shape bomb behind a filter": ("a.h5", lambda p: bomb(p, compression="gzip")),
    "a bomb of labels": ("a.h5", bomb_of_labels),
    "one image too large": ("a.h5", one_image_too_large),
    "a virtual dataset": ("a.h5", virtual),
    "a soft link": ("a.h5", soft_link),
    "a header longer than the file": ("a.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{}")),
    "a shape larger than the data": ("a.safetensors", lambda p: lying_header(p, shape=[10**12, 3, 40, 32])),
    "offsets beyond the file": ("a.safetensors", lambda p: lying_header(p, data_offsets=[0, 10**15])),
    "offsets backwards": ("a.safetensors", lambda p: lying_header(p, data_offsets=[IMAGES.nbytes, 0])),
    "a negative shape": ("a.safetensors", lambda p: lying_header(p, shape=[-3, 3, 40, 32])),
    "a pickle called safetensors": ("a.safetensors", pickled),
    "a pickle called HDF5": ("a.h5", pickled),
    "a pickle called png": ("a.png", pickled),
    "a record that is a list": ("a.safetensors", lambda p: record(p, "[]")),
    "a record without a recipe": ("a.safetensors", lambda p: record(p, "{}")),
    "a record too deep": ("a.safetensors", lambda p: record(p, "[" * 200_000)),
    "a record of numbers": ("a.safetensors", lambda p: record(p, '{"recipe": {"command": 1, "parameters": []}}')),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case, tmp_path, monkeypatch):
    name, make = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    assert ends(lambda: attempt(tmp_path / name)) == "refused"
    assert not (tmp_path / "executed").exists()


def test_names_in_a_table_lead_nowhere(tmp_path):
    """Labels are looked up by the names of files that are there; what else a table names is not opened."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture("PNG"))
    table = tmp_path / "labels.csv"
    table.write_text("../../etc/passwd,1\na.png,1\n")
    assert open_patches(tmp_path / "in", labels=table).labels.tolist() == [1]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in ("pipe.png", "loop.png", "nothing.png"):
        path = tmp_path / name
        os.mkfifo(path) if name == "pipe.png" else path.symlink_to(path if name == "loop.png" else tmp_path / "no")
        with pytest.raises(AdvdiffError, match=name):
            read_image(path)


def test_many_strings_that_are_one_in_the_file(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((1, 3, 32, 32), np.uint8)
        file.create_dataset("advdiff", data=["{}"] * 3000, dtype=h5py.string_dtype())
    with pytest.raises(AdvdiffError, match="is not a single text"):
        open_patches(path)


def test_chunks_that_are_compressed_twice(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((1, 3, 32, 32))
        plan.set_deflate(9)
        plan.set_deflate(9)
        h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((2, 3, 32, 32)), plan)
        file["images"][:] = 1
    with pytest.raises(AdvdiffError, match="compressed in an unusual way"):
        open_patches(path)


@pytest.mark.parametrize(
    "text", ['{"recipe": ' + '{"a": ' * 330 + "1" + "}" * 331, '{"recipe": {"command": "\\ud800", "parameters": {}}}']
)
def test_provenance_that_no_command_wrote(tmp_path, text):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((1, 3, 32, 32), np.uint8)
        file["advdiff"] = text
    with pytest.raises(AdvdiffError, match=r"was not written by advdiff|does not hold a JSON object"):
        open_patches(path)


def test_a_limit_that_leaves_one_class_is_told(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    save_file({"images": np.zeros((4, 3, 32, 32), np.uint8), "labels": np.array([0, 0, 1, 1])}, path)
    open_patches(path, selection=Selection(limit=2))
    assert "all 2 patches selected" in caplog.text
    assert "have label 0" in caplog.text
    caplog.clear()
    for selection in (Selection(limit=3), Selection(limit=1), Selection(), Selection(2, None, 0)):
        open_patches(path, selection=selection)
    assert caplog.text == ""
