"""Folders in, folders out: one lossless file for each, bad files named, re-runs that touch nothing."""

import io
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from advdiff_cli.data.folder_writer import FolderEntry, FolderWriter, output_names
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.patch_writer import OutputSpec
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs import purify_folder
from advdiff_cli.jobs.purify_rows import PurifyJob


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    rng = np.random.default_rng(0)
    for name, size in {
        "a.png": (96, 96),
        "sub dir/b é.jpg": (96, 96),
        "c.tif": (50, 70),
        "D.BMP": (96, 96),
        "c.jpg": (96, 96),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    return root


def purify(advdiff, folder, out, ddpm, *extra, code=0):
    command = ["purify", folder, "-m", ddpm, "-o", out, "--t-star", "0.02", "--sampler-steps", 1, "--batch-size", 2]
    return advdiff(*command, *extra, "--json", code=code)


def files(out):
    return {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".jsonl"
    }


def test_every_file_keeps_its_name_and_size(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    result = purify(advdiff, folder, out, ddpm).json
    assert (result["purified"], result["failed"]) == (5, 0)
    assert set(files(out)) == {"a.png", "sub dir/b é.png", "c.tif", "D.png", "c.png"}
    with Image.open(out / "c.tif") as tif, Image.open(out / "a.png") as png:
        assert (tif.size, tif.format, png.mode) == ((70, 50), "TIFF", "RGB")


def test_the_same_pixels_on_any_number_of_threads(advdiff, folder, ddpm, tmp_path):
    before, found = torch.get_num_threads(), []
    try:
        for k in (1, 3):
            torch.set_num_threads(k)
            purify(advdiff, folder, tmp_path / f"out{k}", ddpm)
            found.append(files(tmp_path / f"out{k}"))
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_resolution_and_profile_are_kept(advdiff, ddpm, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.new("RGB", (64, 96), "pink")
    for name in ("a.png", "b.tif", "c.jpg"):
        picture.save(root / name, dpi=(300, 150), icc_profile=profile)
    picture.convert("L").save(root / "gray.png", icc_profile=profile)
    purify(advdiff, root, out, ddpm)
    for name in ("a.png", "b.tif", "c.png"):
        with Image.open(out / name) as found:
            assert found.info["dpi"] == pytest.approx((300, 150), abs=0.1)
            assert found.info["icc_profile"] == profile
    with Image.open(out / "gray.png") as found:
        assert "icc_profile" not in found.info  # it is of gray, and the result is RGB


def test_large_images_are_purified_alone_and_the_same_in_any_company(advdiff, folder, ddpm, tmp_path):
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (401, 90, 3), np.uint8)).save(folder / "tall.png")
    purify(advdiff, folder, tmp_path / "out", ddpm)
    with Image.open(tmp_path / "out" / "tall.png") as found:
        assert found.size == (90, 401)
    purify(advdiff, folder / "tall.png", tmp_path / "alone", ddpm)
    assert files(tmp_path / "alone")["tall.png"] == files(tmp_path / "out")["tall.png"]


def test_a_rerun_touches_nothing_and_new_and_changed_files_are_done(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    time.sleep(0.01)
    assert purify(advdiff, folder, out, ddpm).json["status"] == "up to date"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    Image.new("RGB", (96, 96), "white").save(folder / "a.png")
    Image.new("RGB", (96, 96), "pink").save(folder / "new.png")
    (out / "D.png").unlink()
    result = purify(advdiff, folder, out, ddpm).json
    assert (result["purified"], result["kept"]) == (3, 3)


def test_a_bad_file_does_not_stop_the_rest(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    good = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").touch()
    Image.new("RGB", (31, 96)).save(folder / "small.png")
    Image.new("RGBA", (96, 96)).save(folder / "clear.png")
    result = purify(advdiff, folder, out, ddpm, code=3)
    assert (result.json["purified"], result.json["failed"]) == (5, 4)
    for name in ("b.png", "empty.png", "small.png", "clear.png"):
        assert len([line for line in result.err.splitlines() if name in line]) == 1
    assert "advdiff: error: 4 of 9 files failed" in result.err.splitlines()[-1]
    journal = [json.loads(line) for line in (out / "advdiff.jsonl").read_text().splitlines()]
    assert {line["file"] for line in journal[1:] if line["status"] == "failed"} == {
        "b.png",
        "empty.png",
        "small.png",
        "clear.png",
    }
    (folder / "b.png").write_bytes(good)
    again = purify(advdiff, folder, out, ddpm, code=3).json
    assert (again["purified"], again["kept"], again["failed"]) == (1, 5, 3)


def test_rows_do_not_depend_on_the_company(advdiff, folder, ddpm, tmp_path):
    purify(advdiff, folder, tmp_path / "all", ddpm)
    for name in ("D.BMP", "sub dir"):
        for file in [folder / name] if (folder / name).is_file() else list((folder / name).iterdir()):
            file.rename(file.with_name("was " + file.name))
    kept = folder / "a.png", folder / "c.jpg", folder / "c.tif"
    purify(advdiff, folder, tmp_path / "fewer", ddpm)
    assert all(k.is_file() for k in kept)
    one, two = files(tmp_path / "all"), files(tmp_path / "fewer")
    for name in ("a.png", "c.png", "c.tif"):
        assert one[name] == two[name]


def test_another_recipe_and_other_peoples_folders_are_refused(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    assert "made with other settings (seed 0 -> 1)" in purify(advdiff, folder, out, ddpm, "--seed", 1, code=1).err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").touch()
    assert "was not made by advdiff purify" in purify(advdiff, folder, tmp_path / "mine", ddpm, code=1).err


def test_names_and_metadata_that_no_one_expects(advdiff, ddpm, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    picture = Image.new("RGB", (96, 96), "pink")
    picture.save(root / "plain.png")
    for name in (b"line\xe2\x80\xa8break.png", b"next\xc2\x85line.png", b"new\nline.png", b"latin-\xe9.png"):
        (root / os.fsdecode(name)).write_bytes((root / "plain.png").read_bytes())
    exif = Image.Exif()
    exif[0x011A], exif[0x011B], exif[0x0128] = 4294967295.0, 4294967295.0, 2
    picture.save(root / "dpi.jpg", exif=exif)
    picture.save(root / "dpi.tif", dpi=(1e9, 1e9))
    assert purify(advdiff, root, out, ddpm).json["purified"] == 7
    assert purify(advdiff, root, out, ddpm).json["status"] == "up to date"


def test_a_dry_run_writes_nothing(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    assert purify(advdiff, folder, out, ddpm, "--dry-run").json["files"] == 5
    assert not out.exists()
    purify(advdiff, folder, out, ddpm)
    before = (out / "advdiff.jsonl").read_bytes()
    purify(advdiff, folder, out, ddpm, "--dry-run", "--overwrite", "--seed", 1)
    assert (out / "advdiff.jsonl").read_bytes() == before


def test_a_list_of_files(advdiff, folder, ddpm, tmp_path, monkeypatch):
    out, listed = tmp_path / "out", tmp_path / "list.txt"
    listed.write_text("a.png\nsub dir/b é.jpg\n\n./a.png\n")
    assert purify(advdiff, folder, out, ddpm, "--files-from", listed).json["purified"] == 2
    assert set(files(out)) == {"a.png", "sub dir/b é.png"}
    listed.write_text("c.jpg\n")
    purify(advdiff, folder, tmp_path / "one", ddpm, "--files-from", listed)
    (folder / "c.bmp").write_bytes((folder / "D.BMP").read_bytes())
    purify(advdiff, folder, tmp_path / "two", ddpm, "--files-from", listed)
    assert (set(files(tmp_path / "one")), set(files(tmp_path / "two"))) == ({"c.png"}, {"c.jpg.png"})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"a.png\n{folder}/c.tif\nno such.png\n".encode())))
    result = purify(advdiff, folder, out, ddpm, "--files-from", "-", code=3)
    assert (result.json["purified"], result.json["kept"], result.json["failed"]) == (1, 1, 1)
    assert "no such.png does not exist" in result.err
    listed.write_text("../elsewhere.png\n")
    assert "is not below" in purify(advdiff, folder, out, ddpm, "--files-from", listed, code=1).err
    listed.write_text("\n")
    assert "lists no images" in purify(advdiff, folder, out, ddpm, "--files-from", listed, code=1).err


def test_listed_names_need_not_be_utf8(advdiff, folder, ddpm, tmp_path):
    name = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(folder / "a.png", name)
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"caf\xe9.png\r\n")
    assert purify(advdiff, folder, tmp_path / "out", ddpm, "--files-from", listed).json["purified"] == 1
    assert os.path.exists(os.fsencode(tmp_path / "out") + b"/caf\xe9.png")
    whole = advdiff("purify", folder / "*f*.png", "-m", ddpm, "-o", tmp_path / "rows.h5", "--t-star", 0.02, "--json")
    assert whole.json["status"] == "done"


def test_what_would_lose_or_ignore_something_is_named(advdiff, folder, ddpm, tmp_path, monkeypatch):
    Image.new("RGB", (96, 96)).save(folder / "pages.tif", save_all=True, append_images=[Image.new("RGB", (96, 96))])
    Image.new("RGB", (700, 600)).save(folder / "large.png")
    compute = PurifyJob.purify

    def short_of_memory(job, images, noise):
        if images.shape[-1] > 512:
            raise MemoryError
        return compute(job, images, noise)

    monkeypatch.setattr(PurifyJob, "purify", short_of_memory)
    result = purify(advdiff, folder, tmp_path / "out", ddpm, code=3)
    assert (result.json["purified"], result.json["failed"]) == (5, 2)
    assert "pages.tif has 2 pages" in result.err
    assert "large.png does not fit into memory" in result.err
    table = tmp_path / "labels.csv"
    table.touch()
    assert "with options for rows" in purify(advdiff, folder, tmp_path / "o", ddpm, "--labels", table, code=1).err


def test_a_folder_that_another_shard_is_beginning(tmp_path):
    (tmp_path / "advdiff.0of2.new").touch()  # killed before it was renamed, or about to be
    (tmp_path / "advdiff.0of2.jsonl.lock").touch()
    made_by = {"command": "purify", "parameters": {}}
    with FolderWriter(OutputSpec(tmp_path, made_by), (1, 2)) as writer:
        assert not writer.is_done(FolderEntry("a.png", "", "a.png"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").touch()
    with pytest.raises(AdvdiffError, match="was not made by advdiff"):
        FolderWriter(OutputSpec(tmp_path / "else", made_by))


def test_strict_stops_at_the_first_that_fails(advdiff, folder, ddpm, tmp_path):
    (folder / "b.png").touch()
    for k in range(40):
        shutil.copy(folder / "a.png", folder / f"z{k}.png")
    one = ["--strict", "--batch-size", 1]
    result = purify(advdiff, folder, tmp_path / "out", ddpm, *one, code=1)
    assert "b.png is not an image that can be read (--strict" in result.err.splitlines()[-1]
    assert result.out == ""
    (folder / "b.png").unlink()
    result = purify(advdiff, folder, tmp_path / "out", ddpm, *one).json
    assert (result["status"], result["failed"]) == ("done", 0)
    assert result["purified"] >= 20
    assert result["kept"] >= 1


def test_shards_share_a_folder(advdiff, folder, ddpm, tmp_path):
    (folder / "bad.png").touch()
    purify(advdiff, folder, tmp_path / "whole", ddpm, code=3)
    out = tmp_path / "out"
    counts = [purify(advdiff, folder, out, ddpm, "--shard", f"{i}/3", code=code).json for i, code in ((1, 0), (0, 0))]
    assert [(c["files"], c["purified"]) for c in counts] == [(2, 2), (2, 2)]
    assert sorted(p.name for p in out.glob("*.jsonl")) == ["advdiff.0of3.jsonl", "advdiff.1of3.jsonl"]
    assert "made with other settings" in purify(advdiff, folder, out, ddpm, "--shard", "2/3", "--seed", 1, code=1).err
    purify(advdiff, folder, out, ddpm, "--shard", "2/3", code=3)
    result = purify(advdiff, folder, out, ddpm, code=3).json
    assert (result["purified"], result["kept"], result["failed"]) == (0, 5, 1)
    assert [p.name for p in out.glob("*.jsonl")] == ["advdiff.jsonl"]
    assert files(out) == files(tmp_path / "whole")
    assert not list(out.rglob("*.lock"))


def test_shards_that_differ_about_a_file_do_it_again(advdiff, folder, ddpm, tmp_path):
    out, white, pink = tmp_path / "out", Image.new("RGB", (96, 96), "white"), Image.new("RGB", (96, 96), "pink")
    for image, shard in ((white, "0/4"), (pink, "0/2")):
        image.save(folder / "D.BMP")  # the first in order
        purify(advdiff, folder, out, ddpm, "--shard", shard)
    white.save(folder / "D.BMP")
    purify(advdiff, folder, out, ddpm)
    purify(advdiff, folder, tmp_path / "whole", ddpm)
    assert files(out) == files(tmp_path / "whole")


def test_one_process_at_a_time(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    with OutputLock(out / "advdiff.jsonl"):
        assert "is being written by another process" in purify(advdiff, folder, out, ddpm, code=1).err
    purify(advdiff, folder, out, ddpm)


def test_links_out_of_the_output_are_not_written_through(advdiff, folder, ddpm, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "out-elsewhere"  # of one beginning
    purify(advdiff, folder, out, ddpm)
    elsewhere.mkdir()
    precious = elsewhere / "precious"
    precious.write_text("mine")
    shutil.rmtree(out / "sub dir")
    (out / "sub dir").symlink_to(elsewhere)
    (out / "a.png").unlink()
    (out / ".a.part.png").symlink_to(precious)
    (out / "D.png").unlink()
    (out / "D.png").symlink_to(precious)
    result = purify(advdiff, folder, out, ddpm, "--overwrite", code=3)
    assert "is a link to a place outside" in result.err
    assert result.json["failed"] == 1
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert precious.read_text() == "mine"
    assert not (out / "D.png").is_symlink()


def test_globs_and_single_images(advdiff, folder, ddpm, tmp_path):
    assert purify(advdiff, f"{folder}/*.jpg", tmp_path / "g", ddpm).json["files"] == 1
    assert purify(advdiff, folder / "a.png", tmp_path / "s", ddpm).json["files"] == 1
    assert set(files(tmp_path / "s")) == {"a.png"}
    assert "no images in" in purify(advdiff, f"{folder}/*.gif", tmp_path / "n", ddpm, code=1).err
    assert not (tmp_path / "n").exists()


def test_an_output_inside_the_input_is_not_read_back(advdiff, folder, ddpm):
    purify(advdiff, folder, folder / "out", ddpm)
    assert purify(advdiff, folder, folder / "out", ddpm).json["files"] == 5


def test_the_noise_defense_needs_no_model(advdiff, folder, tmp_path):
    result = advdiff("purify", folder, "--defense", "noise", "-o", tmp_path / "n", "--json").json
    assert result["purified"] == 5


def test_precision_is_taken_from_the_journal(advdiff, folder, ddpm, tmp_path):
    purify(advdiff, folder, tmp_path / "out", ddpm, "--precision", "fp32")
    assert purify(advdiff, folder, tmp_path / "out", ddpm).json["status"] == "up to date"


def test_half_a_line_in_the_journal_is_forgotten(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    journal = out / "advdiff.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    for expected in ((1, 4), (0, 5)):
        result = purify(advdiff, folder, out, ddpm).json
        assert (result["purified"], result["kept"]) == expected


def test_stems_that_collide_keep_their_whole_name():
    names = {"a.jpg": "a.jpg.png", "a.bmp": "a.bmp.png", "b.jpg": "b.png", "c.tif": "c.tif", "c.png": "c.png"}
    names["d/a.jpg"] = "d/a.png"
    assert output_names(list(names)) == names
    chain = output_names(["a.jpg", "a.bmp", "a.jpg.png"])
    assert len(set(chain.values())) == 3


def test_large_images_are_read_computed_and_written_one_at_a_time(advdiff, ddpm, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for k in range(5):
        Image.fromarray(np.full((32, 400, 3), 40 * k, np.uint8)).save(tmp_path / "in" / f"{k}.png")
    held, most = [], []
    read, write = purify_folder.read_image, FolderWriter.write

    def reading(file):
        held.append(file)
        most.append(len(held))
        return read(file)

    def writing(*arguments):
        held.pop()
        return write(*arguments)

    monkeypatch.setattr(purify_folder, "read_image", reading)
    monkeypatch.setattr(FolderWriter, "write", writing)
    assert purify(advdiff, tmp_path / "in", tmp_path / "out", ddpm, "--batch-size", 16).json["purified"] == 5
    assert most == [1] * 5


def test_a_large_image_waits_for_the_batches_before_it(advdiff, ddpm, tmp_path, monkeypatch, threads):
    """Memory is granted to them or to it."""
    (tmp_path / "in").mkdir()
    for k in range(9):
        size = (32, 400) if k in (4, 6) else (32, 32)
        Image.fromarray(np.full((*size, 3), 20 * k, np.uint8)).save(tmp_path / "in" / f"{k}.png")
    computing, most = [], []

    def compute(job, images, noise):
        computing.append(max(images.shape[-2:]) > 384)
        most.append(not any(computing) or len(computing) == 1)
        time.sleep(0.02)
        most.append(not any(computing) or len(computing) == 1)
        computing.pop()
        return images

    monkeypatch.setattr(PurifyJob, "purify", compute)
    threads(3)
    assert purify(advdiff, tmp_path / "in", tmp_path / "out", ddpm, "--batch-size", 1).json["purified"] == 9
    assert len(most) == 18
    assert all(most)


def test_a_file_with_spoilt_exif_is_named_and_the_others_go_on(advdiff, tmp_path, ddpm):
    root = tmp_path / "in"
    root.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    picture.save(root / "good.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "bad.jpg", exif=exif, dpi=(72, 72))
    whole = (root / "bad.jpg").read_bytes()
    head = whole.index(b"Exif\0\0") + 6
    (root / "bad.jpg").write_bytes(whole[:head] + bytes(8) + whole[head + 8 :])  # the TIFF header of the metadata
    done = purify(advdiff, root, tmp_path / "out", ddpm, code=3)
    assert "bad.jpg cannot be decoded" in done.err
    assert set(files(tmp_path / "out")) == {"good.png"}
