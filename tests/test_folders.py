"""Folders in, folders out: one lossless file for each, bad files named, re-runs that touch nothing."""

import errno
import io
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from advdiff_cli.data.folder_journal import FolderEntry, output_name
from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_files import read_image
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import recipe
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs import folder_images
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
    assert set(files(out)) == {"a.png", "sub dir/b é.jpg.png", "c.tif", "D.BMP", "c.jpg.png"}
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
    for name in ("a.png", "b.tif", "c.jpg.png"):
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
    (out / "D.BMP").unlink()
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
    (folder / "b.png").write_bytes(good[: len(good) // 3])
    purify(advdiff, folder, out, ddpm, code=3)
    assert not (out / "b.png").exists()  # what is left of other content would be taken for it
    assert (out / "a.png").exists()


def test_rows_do_not_depend_on_the_company(advdiff, folder, ddpm, tmp_path):
    purify(advdiff, folder, tmp_path / "all", ddpm)
    for name in ("D.BMP", "sub dir"):
        for file in [folder / name] if (folder / name).is_file() else list((folder / name).iterdir()):
            file.rename(file.with_name("was " + file.name))
    kept = folder / "a.png", folder / "c.jpg", folder / "c.tif"
    purify(advdiff, folder, tmp_path / "fewer", ddpm)
    assert all(k.is_file() for k in kept)
    one, two = files(tmp_path / "all"), files(tmp_path / "fewer")
    for name in ("a.png", "c.jpg.png", "c.tif"):
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
    assert set(files(out)) == {"a.png", "sub dir/b é.jpg.png"}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"a.png\n{folder}/c.tif\nno such.png\n".encode())))
    result = purify(advdiff, folder, out, ddpm, "--files-from", "-", code=3)
    assert (result.json["purified"], result.json["kept"], result.json["failed"]) == (1, 1, 1)
    assert "no such.png does not exist" in result.err
    listed.write_text("../elsewhere.png\n")
    assert "is not below" in purify(advdiff, folder, out, ddpm, "--files-from", listed, code=1).err
    monkeypatch.chdir(folder)
    assert "is not below" in purify(advdiff, ".", out, ddpm, "--files-from", listed, code=1).err
    listed.write_text("notes.txt\n")
    assert "not named as an image" in purify(advdiff, folder, out, ddpm, "--files-from", listed, code=1).err
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

    def short_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(PurifyJob, "purify_large", short_of_memory)
    result = purify(advdiff, folder, tmp_path / "out", ddpm, code=3)
    assert (result.json["purified"], result.json["failed"]) == (5, 2)
    assert "pages.tif has 2 pages" in result.err
    assert "large.png does not fit into memory" in result.err
    table = tmp_path / "labels.csv"
    table.touch()
    assert "with --split or --labels" in purify(advdiff, folder, tmp_path / "o", ddpm, "--labels", table, code=1).err


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
    assert "b.png is not a PNG, JPEG, TIFF or BMP image that can be read (--strict" in result.err.splitlines()[-1]
    assert result.out == ""
    (folder / "b.png").unlink()
    result = purify(advdiff, folder, tmp_path / "out", ddpm, *one).json
    assert (result["status"], result["failed"]) == ("done", 0)
    assert result["purified"] >= 20
    assert result["kept"] >= 1


def test_a_dry_run_tells_what_is_left(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"

    def planned():
        told = purify(advdiff, folder, out, ddpm, "--dry-run").json
        return told["status"], [told[k] for k in ("files", "new", "changed", "failed", "kept")]

    assert planned() == ("would purify", [5, 5, 0, 0, 0])
    assert not out.exists()
    (folder / "bad.png").touch()
    purify(advdiff, folder, out, ddpm, code=3)
    assert planned() == ("would purify", [6, 0, 0, 1, 5])
    shutil.copy(folder / "a.png", folder / "new.png")
    shutil.copy(folder / "D.BMP", folder / "a.png")  # other content
    (out / "c.tif").unlink()
    before = files(out), (out / "advdiff.jsonl").read_bytes()
    assert planned() == ("would purify", [7, 1, 2, 1, 3])
    assert (files(out), (out / "advdiff.jsonl").read_bytes()) == before
    done = purify(advdiff, folder, out, ddpm, code=3).json
    assert (done["purified"], done["failed"], done["kept"]) == (3, 1, 3)
    (folder / "bad.png").unlink()
    assert planned() == ("up to date", [6, 0, 0, 0, 6])
    assert purify(advdiff, folder, out, ddpm, "--dry-run", "--overwrite").json["new"] == 6
    assert "made with other settings" in purify(advdiff, folder, out, ddpm, "--dry-run", "--seed", 1, code=1).err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").touch()
    assert "was not made by advdiff" in purify(advdiff, folder, tmp_path / "mine", ddpm, "--dry-run", code=1).err


def test_outputs_whose_input_is_gone_are_counted_apart(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"

    def counts():
        told = advdiff("info", out, "--json").json
        return [told[k] for k in ("current", "without_input", "failed")]

    purify(advdiff, folder, out, ddpm)
    assert counts() == [5, 0, 0]
    (folder / "a.png").rename(tmp_path / "a.png")
    purify(advdiff, folder, out, ddpm, "--limit", 1)  # not a run that sees all inputs
    purify(advdiff, folder, out, ddpm, "--shard", "0/2")
    assert counts() == [5, 0, 0]
    assert purify(advdiff, folder, out, ddpm).json["kept"] == 4
    assert counts() == [4, 1, 0]
    assert (out / "a.png").exists()
    (tmp_path / "a.png").rename(folder / "a.png")  # back, and not purified again
    assert purify(advdiff, folder, out, ddpm).json["kept"] == 5
    assert counts() == [5, 0, 0]


def test_shards_share_a_folder(advdiff, folder, ddpm, tmp_path):
    (folder / "bad.png").touch()
    purify(advdiff, folder, tmp_path / "whole", ddpm, code=3)
    out = tmp_path / "out"
    counts = [purify(advdiff, folder, out, ddpm, "--shard", f"{i}/3", code=code).json for i, code in ((1, 0), (0, 0))]
    assert [(c["files"], c["purified"]) for c in counts] == [(2, 2), (2, 2)]
    assert sorted(p.name for p in out.glob("*.jsonl")) == ["advdiff.0of3.jsonl", "advdiff.1of3.jsonl"]
    told = advdiff("info", out, "--json").json
    assert (told["current"], told["provenance"]["recipe"]["command"]) == (4, "purify")
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
    (out / "D.BMP").unlink()
    (out / "D.BMP").symlink_to(precious)
    result = purify(advdiff, folder, out, ddpm, "--overwrite", code=3)
    assert "is a link to a place outside" in result.err
    assert result.json["failed"] == 1
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert precious.read_text() == "mine"
    assert not (out / "D.BMP").is_symlink()


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


def test_no_two_inputs_have_one_output():
    stems = ["a", "a.jpg", "a.jpeg", "a.png", "a.tif", "a.bmp", "d/a", "a.JPG.PNG", "a.jpg.tif"]
    names = [
        stem + suffix for stem in stems for suffix in (".png", ".jpg", ".jpeg", ".tif", ".bmp", ".PNG", ".jpg.png")
    ]
    outputs = {name: output_name(name) for name in names}
    assert len(set(outputs.values())) == len(set(names))
    assert outputs["a.png"] == "a.png"
    assert outputs["a.jpg"] == "a.jpg.png"
    assert outputs["a.jpg.png"] == "a.jpg.png.png"
    assert outputs["d/a.bmp"] == "d/a.bmp"


def test_an_image_added_later_changes_no_other_output(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    (folder / "a.png").rename(tmp_path / "later.png")
    shutil.copy(folder / "c.jpg", folder / "a.jpg")
    purify(advdiff, folder, out, ddpm)
    before = files(out)
    (tmp_path / "later.png").rename(folder / "a.png")
    assert purify(advdiff, folder, out, ddpm).json["purified"] == 1
    assert {k: v for k, v in files(out).items() if k != "a.png"} == before


def test_an_output_of_another_name_is_replaced(advdiff, folder, ddpm, tmp_path):
    """The journal tells of c.png for c.jpg; the output is written again under its present name."""
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    whole = files(out)
    journal = out / "advdiff.jsonl"
    journal.write_text(journal.read_text().replace("c.jpg.png", "c.png"))
    (out / "c.jpg.png").rename(out / "c.png")
    (out / "mine.png").write_bytes(b"of the user")
    assert purify(advdiff, folder, out, ddpm).json["purified"] == 1
    assert files(out) == whole | {"mine.png": b"of the user"}


@pytest.mark.parametrize("inside", ["out", "1/out"])
def test_purified_copies_below_a_folder_are_not_more_patches(inside, advdiff, ddpm, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("0/a.png", "0/b.png", "1/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "in" / name)
    evaluate = ["evaluate", "in", "-c", classifier]
    before = advdiff(*evaluate, "--json").json["sets"]
    out = f"in/{inside}"
    for purified in (3, 0):
        done = purify(advdiff, "in", out, ddpm)
        assert (done.json["purified"], done.json["files"]) == (purified, 3)
        assert "is left out" not in done.err  # its own output
    assert len(list((tmp_path / out).rglob("*.png"))) == 3
    found = advdiff(*evaluate, "--json")
    assert found.json["sets"] == before
    assert f"{out} holds images that advdiff purify wrote, and is left out" in found.err
    for path in ("in", "in/**/*.png"):
        told = advdiff("predict", path, "-c", classifier, "-o", tmp_path / "p.csv", "--overwrite", "--json")
        assert told.json["patches"] == 3
        assert "is left out" in told.err
    assert purify(advdiff, "in", "elsewhere", ddpm).json["files"] == 3
    (tmp_path / "in" / "list.txt").write_text(f"{inside}/0/a.png\n")
    listed = purify(advdiff, "in", "listed", ddpm, "--files-from", "in/list.txt")
    assert listed.json["purified"] == 1 and "is left out" not in listed.err
    for path in (out, f"{out}/**/*.png"):  # named, they are the patches
        told = advdiff("predict", path, "-c", classifier, "-o", tmp_path / "p.csv", "--overwrite", "--json")
        assert told.json["patches"] == 3
        assert "is left out" not in told.err


def test_a_folder_of_results_alone_holds_no_images(advdiff, folder, ddpm, tmp_path):
    purify(advdiff, folder / "a.png", tmp_path / "results" / "pur", ddpm)
    told = purify(advdiff, tmp_path / "results", tmp_path / "other", ddpm, code=1).err
    assert "results/pur holds images that advdiff purify wrote, and is left out" in told
    assert f"no images in {tmp_path / 'results'}" in told


def test_a_file_of_the_user_is_not_replaced(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder / "a.png", out, ddpm)
    (out / "c.tif").write_bytes(b"of the user")
    result = purify(advdiff, folder, out, ddpm, code=3)
    assert "c.tif exists and was not made by advdiff" in result.err
    assert (out / "c.tif").read_bytes() == b"of the user"


@pytest.mark.parametrize("out", ["y.png", "y.txt", "in", "."])
def test_an_output_that_is_no_folder_of_its_own(advdiff, folder, ddpm, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = purify(advdiff, "in", out, ddpm, code=1)
    assert {"in": "is the folder of the images themselves", ".": "are below --out"}.get(
        out, "name of a file"
    ) in result.err
    listed = tmp_path / "in" / "list.txt"
    listed.write_text("a.png\n")
    if out == "in":
        again = purify(advdiff, "in/*.png", out, ddpm, "--overwrite", "--files-from", listed, code=1)
        assert "would replace" in again.err
    listed.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_few_of_a_folder(advdiff, folder, ddpm, tmp_path):
    assert purify(advdiff, folder, tmp_path / "o", ddpm, "--limit", 2).json["files"] == 2
    assert purify(advdiff, folder, tmp_path / "o", ddpm, "--range", "1:4").json["kept"] == 1
    assert purify(advdiff, folder, tmp_path / "o", ddpm, "--shuffle-seed", 0).json["files"] == 5
    assert "check --limit and --range" in purify(advdiff, folder, tmp_path / "o", ddpm, "--range", "9:", code=1).err


def test_subfolders_that_are_not_searched_are_named(advdiff, folder, ddpm, tmp_path, monkeypatch):
    (folder / "closed").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    scandir = os.scandir

    def refusing(place="."):
        if os.fspath(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    result = purify(advdiff, folder, tmp_path / "out", ddpm, code=3)
    assert (result.json["purified"], result.json["failed"]) == (5, 2)
    assert "closed cannot be searched (Permission denied)" in result.err
    assert "linked is a symbolic link to a folder" in result.err
    listed = advdiff("info", folder, code=1)
    assert "closed cannot be searched" in listed.err or "linked is a symbolic link" in listed.err


def test_hidden_files_are_no_patches(advdiff, folder, ddpm, tmp_path):
    (folder / ".cache").mkdir()
    shutil.copy(folder / "a.png", folder / ".cache" / "a.png")
    shutil.copy(folder / "a.png", folder / ".p4.0of2.part.png")
    assert purify(advdiff, folder, tmp_path / "out", ddpm).json["files"] == 5


def test_what_a_killed_process_left_is_swept(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    whole = files(out)
    left = [
        ".advdiff.0of2.0123456789abcdef.part.png",
        "sub dir/.advdiff.0123456789abcdef.part.png",
    ]
    for name in [*left, ".mine.part.png"]:
        (out / name).write_bytes(b"half")
    purify(advdiff, folder, out, ddpm)
    assert files(out) == whole | {".mine.part.png": b"half"}


def test_a_damaged_output_is_made_again(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    whole = files(out)
    (out / "a.png").write_bytes(b"")
    (out / "c.tif").write_bytes(whole["c.tif"][:100])
    assert purify(advdiff, folder, out, ddpm).json["purified"] == 2
    assert files(out) == whole


def test_a_damaged_journal_line_is_told(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    journal = out / "advdiff.jsonl"
    lines = journal.read_text().splitlines()
    lines[-1], lines[-2] = '{"file": 7}', "[" * 5000
    journal.write_text("\n".join(lines) + "\n")
    result = purify(advdiff, folder, out, ddpm)
    assert "2 lines of the journal are damaged" in result.err
    assert (result.json["purified"], result.json["kept"]) == (2, 3)
    journal.write_text("x" + journal.read_text())
    assert "give --overwrite or another --out" in purify(advdiff, folder, out, ddpm, code=1).err
    assert purify(advdiff, folder, out, ddpm, "--overwrite").json["purified"] == 5


def test_one_odd_file_does_not_stop_a_folder(advdiff, folder, ddpm, tmp_path):
    picture = Image.new("RGB", (96, 64), "pink")
    for name, kind in (("ascii", b"\x02\x00"), ("undefined", b"\x07\x00"), ("nine", b"\x03\x00")):
        exif = Image.Exif()
        exif[0x0112] = 9
        raw = exif.tobytes()
        at = raw.index(b"\x12\x01\x03\x00") if raw[6:8] == b"II" else raw.index(b"\x01\x12\x00\x03")
        kind = kind if raw[6:8] == b"II" else kind[::-1]
        picture.save(folder / f"{name}.jpg", exif=raw[: at + 2] + kind + raw[at + 4 :])
    (folder / ("n" * 247 + ".png")).write_bytes((folder / "a.png").read_bytes())
    (folder / ("n" * 249 + ".jpg")).write_bytes((folder / "c.jpg").read_bytes())
    result = purify(advdiff, folder, tmp_path / "out", ddpm, code=3)
    assert (result.json["purified"], result.json["failed"]) == (9, 1)
    assert "too long a name" in result.err
    for name in ("ascii", "undefined", "nine"):
        with Image.open(tmp_path / "out" / f"{name}.jpg.png") as found:
            assert found.size == (96, 64)


def test_an_opaque_alpha_channel_is_rgb(advdiff, ddpm, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    rgb.save(root / "rgb.png")
    rgb.convert("RGBA").save(root / "rgba.png")
    noise = ["purify", root, "--defense", "noise", "-o", tmp_path / "rows.h5", "--json"]
    assert advdiff(*noise).json["patches"] == 2
    assert np.array_equal(*(read_image(root / name) for name in ("rgb.png", "rgba.png")))


def test_only_four_decoders_open_a_file(advdiff, folder, ddpm, tmp_path):
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\nshowpage\n")
    Image.new("RGB", (96, 96)).save(folder / "picture.png", format="GIF")
    result = purify(advdiff, folder, tmp_path / "out", ddpm, code=3)
    assert result.json["failed"] == 2
    assert "script.png is not a PNG, JPEG, TIFF or BMP image" in result.err


def test_large_images_are_read_computed_and_written_one_at_a_time(advdiff, ddpm, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for k in range(5):
        Image.fromarray(np.full((32, 400, 3), 40 * k, np.uint8)).save(tmp_path / "in" / f"{k}.png")
    held, most = [], []
    read, write = folder_images.read_image, FolderWriter.write

    def reading(file):
        held.append(file)
        most.append(len(held))
        return read(file)

    def writing(*arguments):
        held.pop()
        return write(*arguments)

    monkeypatch.setattr(folder_images, "read_image", reading)
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

    def compute(job, images, *_):
        computing.append(max(images.shape[-2:]) > 384)
        most.append(not any(computing) or len(computing) == 1)
        time.sleep(0.02)
        most.append(not any(computing) or len(computing) == 1)
        computing.pop()
        return images.cpu() if isinstance(images, torch.Tensor) else images  # purified, they are on the CPU

    monkeypatch.setattr(PurifyJob, "purify", compute)
    monkeypatch.setattr(PurifyJob, "purify_large", compute)
    threads(3)
    assert purify(advdiff, tmp_path / "in", tmp_path / "out", ddpm, "--batch-size", 1).json["purified"] == 9
    assert len(most) == 18
    assert all(most)


def test_a_picture_with_spoilt_exif_is_read_upright(advdiff, tmp_path, ddpm):
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
    purify(advdiff, root, tmp_path / "out", ddpm)
    assert set(files(tmp_path / "out")) == {"good.png", "bad.jpg.png"}


def test_overwriting_a_few_keeps_the_others_and_is_finished_later(advdiff, folder, ddpm, tmp_path):
    out = tmp_path / "out"
    purify(advdiff, folder, out, ddpm)
    before = files(out)
    purify(advdiff, folder, out, ddpm, "--overwrite", "--seed", 1, "--limit", 2)
    assert set(files(out)) == set(before)
    assert sum(files(out)[name] != before[name] for name in before) == 2
    result = purify(advdiff, folder, out, ddpm, "--seed", 1).json
    assert (result["purified"], result["kept"], result["failed"]) == (3, 2, 0)
    purify(advdiff, folder, tmp_path / "whole", ddpm, "--seed", 1)
    assert files(out) == files(tmp_path / "whole")


def test_a_rename_that_fails_is_told_and_the_rest_is_named_later(tmp_path, monkeypatch):
    spec, image = OutputSpec(tmp_path / "out", recipe("purify", {})), np.zeros((4, 4, 3), np.uint8)
    real, failures = os.replace, [OSError(errno.EDQUOT, "Disk quota exceeded")]

    def replace(source, target):
        if str(target).endswith("b.png") and failures:
            raise failures.pop()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Disk quota exceeded"), FolderWriter(spec) as writer:
        for name in ("a.png", "b.png", "c.png"):
            writer.write(FolderEntry(name, "0", name), image)
        writer._commit()
    assert sorted(files(tmp_path / "out")) == ["a.png", "b.png", "c.png"]
    with FolderWriter(spec) as writer:
        assert all(writer.is_done(FolderEntry(name, "0", name)) for name in ("a.png", "b.png", "c.png"))


def test_the_working_folder_is_an_input_like_others(advdiff, folder, ddpm, tmp_path, monkeypatch):
    (folder / "c.tif").unlink()
    monkeypatch.chdir(folder)
    out = tmp_path / "rows.h5"
    assert advdiff("purify", ".", "-m", ddpm, "-o", out, "--t-star", 0.02, "--json").json["patches"] == 4
