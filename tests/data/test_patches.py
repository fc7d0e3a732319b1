"""The four forms hold the same rows; selection, labels and keys."""

import shutil
import struct
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from advdiff_cli.data.image_files import read_image
from advdiff_cli.data.patches import open_patches, open_sets
from advdiff_cli.data.selection import Selection
from advdiff_cli.errors import AdvdiffError


def forms(folder, images, labels):
    save_file({"images": images, "labels": labels}, folder / "a.safetensors")
    with h5py.File(folder / "a.h5", "w") as h5:
        h5["images"], h5["labels"] = images, labels
    with h5py.File(folder / "camelyonpatch_level_2_split_test_x.h5", "w") as h5:
        h5["x"] = images.transpose(0, 2, 3, 1)
    with h5py.File(folder / "camelyonpatch_level_2_split_test_y.h5", "w") as h5:
        h5["y"] = labels.astype(np.uint8).reshape(-1, 1, 1, 1)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "images" / str(label) / f"{i}.png")
    return [folder / "a.safetensors", folder / "a.h5", folder / "camelyonpatch_level_2_split_test_x.h5"]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 3, 40, 48), np.uint8), np.array([0, 0, 0, 0, 1, 1, 1])


def test_every_form_gives_the_same_rows(tmp_path, arrays):
    images, labels = arrays
    paths = forms(tmp_path, images, labels)
    sets = [open_patches(p) for p in paths] + [
        open_patches(tmp_path / "images"),
        open_patches(f"{tmp_path}/images/*/*.png"),
    ]
    for s in sets:
        assert len(s) == 7
        assert s.shape == (40, 48)
        assert np.array_equal(s.require_labels(), labels)
        assert np.array_equal(s.read([6, 0, 3]).numpy(), images[[6, 0, 3]].astype(np.float32) / np.float32(255))
    assert len({s.fingerprint() for s in sets[:3]}) == 1
    assert len({s.origins().tobytes() for s in sets[:3]}) == 1


def test_rows_of_one_index_are_refused(tmp_path, arrays):
    images, labels = arrays
    index = np.array([0, 1, 2, 3, 4, 5, 2])
    save_file({"images": images, "labels": labels, "index": index}, tmp_path / "a.safetensors")
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["images"], h5["index"] = images, index
    for name in ("a.safetensors", "a.h5"):
        with pytest.raises(AdvdiffError, match=f"index of .*{name} names row 2 more than once"):
            open_patches(tmp_path / name)


def test_pcam_folder_takes_a_split(patches, test_x):
    for root in (patches, patches / "pcam"):
        found = open_patches(root, split="test")
        assert found.path == test_x
        assert found.labels is not None
    assert open_patches(patches, split="val").path.name.endswith("valid_x.h5")
    with pytest.raises(AdvdiffError, match="choose one with --split"):
        open_patches(patches)
    with pytest.raises(AdvdiffError, match="no PCam split is called tset"):
        open_patches(patches, split="tset")
    with pytest.raises(AdvdiffError, match=r"test_x\.h5 holds its own labels"):
        open_patches(patches, split="test", labels=patches / "no such.csv")
    with pytest.raises(AdvdiffError, match="is a glob; --split"):
        open_patches(patches / "images" / "test" / "0" / "*.png", split="test")
    with pytest.raises(AdvdiffError, match="no such file or folder"):
        open_patches(patches / "nowhere", split="test")


def test_split_and_labels_go_to_the_sets_that_take_them(patches, tmp_path):
    folder = patches / "images" / "test"
    table = tmp_path / "l.csv"
    table.write_text("file,label\n" + "".join(f"{f.relative_to(folder)},1\n" for f in folder.rglob("*.*")))
    images, pcam = open_sets([str(folder), str(patches)], split="test", labels=table)
    assert images.labels.all()
    assert not pcam.labels.all()


def test_reads_the_real_layout(test_x):
    with h5py.File(test_x) as h5:
        raw = h5["x"][3:5]
    rows = open_patches(test_x).read([3, 4]).numpy()
    assert np.array_equal((rows * 255).round().astype(np.uint8), raw.transpose(0, 3, 1, 2))


def test_selection_is_shuffle_then_range_then_limit(tmp_path, arrays):
    forms(tmp_path, *arrays)
    path = tmp_path / "a.h5"
    whole = open_patches(path, selection=Selection(shuffle_seed=3))
    part = open_patches(path, selection=Selection(limit=2, range=(1, 6), shuffle_seed=3))
    assert sorted(whole.index) == list(range(7))
    assert list(part.index) == list(whole.index[1:3])
    assert part.fingerprint() != whole.fingerprint()
    assert np.array_equal(part.origins(), whole.origins()[1:3])


def test_labels_from_a_table(tmp_path, arrays):
    forms(tmp_path, *arrays)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (tmp_path / "images" / "0" / f"{i}.png").rename(flat / f"{i}.png")
    assert open_patches(flat).labels is None
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n0.png,1\n1.png,0\n2.png,1\n")
    assert list(open_patches(flat, labels=table).require_labels()) == [1, 0, 1]
    table.write_text("0.png,1\n1.png,2\n2.png,1\n")
    with pytest.raises(AdvdiffError, match=r"line 2 of .* labels 1\.png 2"):
        open_patches(flat, labels=table)


def test_only_the_rows_asked_for_are_read(tmp_path):
    """A PCam-sized file: room for 262,144 rows and few written, which a reader that loads them would notice."""
    path = tmp_path / "camelyonpatch_level_2_split_train_x.h5"
    with h5py.File(path, "w") as h5:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((262_144, 96, 96, 3))
        h5py.Dataset(h5py.h5d.create(h5.id, b"x", h5py.h5t.NATIVE_UINT8, space, plan))[200_000] = 7
    s = open_patches(path, selection=Selection(range=(199_999, 200_001)))
    assert s.read([0, 1])[:, 0, 0, 0].tolist() == pytest.approx([0, 7 / 255])


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_image_modes_become_rgb(tmp_path, mode):
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).convert(mode).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").shape == (3, 40, 40)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(np.zeros((40, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_patches(tmp_path).shape == (64, 40)
    assert read_image(tmp_path / "a.jpg").shape == (3, 64, 40)


def test_sixteen_bit_and_transparent_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (40, 40)).save(tmp_path / "clear.png")
    (tmp_path / "deep_rgb.png").write_bytes(_png_of_16_bits())
    for name in ("deep.png", "deep_rgb.png"):
        with pytest.raises(AdvdiffError, match="more than 8 bits"):
            read_image(tmp_path / name)
    with pytest.raises(AdvdiffError, match="transparent"):
        read_image(tmp_path / "clear.png")


def _png_of_16_bits():
    """A 40x40 RGB PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(40 * 6)) * 40
    head = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_pillow_s_warnings_are_not_shown(advdiff, ddpm, tmp_path, monkeypatch):
    """The size of an image is checked by advdiff; main() leaves out what Pillow says of it."""
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(Image.DecompressionBombWarning):
        read_image(tmp_path / "in" / "a.png")
    purify = ["purify", tmp_path / "in", "-m", ddpm, "--t-star", "0.02", "--sampler-steps", 1, "-o", tmp_path / "out"]
    assert "Warning" not in advdiff(*purify).err


def test_sets_made_from_others_are_opened_beside_them(advdiff, patches, classifier, tmp_path):
    """The options that a folder needs are not about the files that were made from it."""
    found = sorted(p for p in (patches / "images" / "test").rglob("*") if p.is_file())[:6]
    flat, labels, adv, split = (tmp_path / name for name in ("flat", "labels.csv", "adv.h5", "split.h5"))
    flat.mkdir()
    for i, image in enumerate(found):
        shutil.copy(image, flat / f"{i}{image.suffix}")
    lines = [f"{i}{image.suffix},{i % 2}" for i, image in enumerate(found)]
    labels.write_text("\n".join(["file,label", *lines]))
    model = ["-c", classifier, "--json"]
    advdiff("attack", flat, "--labels", labels, *model, "--steps", 1, "-o", adv)
    both = advdiff("evaluate", flat, adv, "--labels", labels, *model).json["sets"]
    assert [s["n"] for s in both] == [6, 6]
    assert "holds its own labels" in advdiff("evaluate", adv, "--labels", labels, *model, code=1).err
    advdiff("attack", patches, "--split", "test", *model, "--steps", 1, "-o", split)
    both = advdiff("evaluate", patches, split, "--split", "test", *model).json["sets"]
    assert both[0]["n"] == both[1]["n"]
    assert "is a file; --split chooses" in advdiff("evaluate", split, "--split", "test", *model, code=1).err
