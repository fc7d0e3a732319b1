"""Bad input: one line that names what and where, a non-zero exit, and nothing under the output's name."""

import errno
import os
import re

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from advdiff_cli.data.safetensors_file import SafetensorsTarget
from advdiff_cli.errors import AdvdiffError

IMAGES = np.full((4, 3, 48, 48), 0.5, np.float32)
LABELS = np.array([0, 1, 0, 1])


def h5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value


def st(path, **tensors):
    save_file(tensors, path)


def put(array, where, value):
    changed = array.copy()
    changed[where] = value
    return changed


def truncated(path, **tensors):
    (st if path.suffix == ".safetensors" else h5)(path, **tensors)
    path.write_bytes(path.read_bytes()[:-4000])


def linked(path, **tensors):
    other = path.with_name("other.h5")
    h5(other, images=IMAGES)
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(other), "images")


def stored_outside(path, **tensors):
    path.with_name("raw").write_bytes(IMAGES.tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "images", IMAGES.shape, np.float32, external=[(str(path.with_name("raw")), 0, IMAGES.nbytes)]
        )


def large_chunks(path):
    with h5py.File(path, "w") as file:
        shape = (4, 3, 48, 48)
        file.create_dataset("images", shape, "f4", IMAGES, maxshape=(None, *shape[1:]), chunks=(2500, *shape[1:]))


def large_rows(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (4, 3, 9400, 9400), "u1", chunks=(1, 3, 9400, 9400), compression="gzip")
        for i in range(4):  # which are a gigabyte in one megabyte
            file["images"][i] = np.zeros((3, 9400, 9400), np.uint8)


def large_image(path):
    (path / "0").mkdir(parents=True)
    Image.new("RGB", (9400, 9400)).save(path / "0" / "a.png")


CASES = {
    "missing file": ("a.h5", lambda p: None, r"no such file or folder: .*a\.h5"),
    "empty folder": ("d", lambda p: p.mkdir(), r"no images .*in .*d"),
    "not a patch set": ("a.txt", lambda p: p.write_text("x"), r"a\.txt is not a patch set"),
    "truncated h5": ("a.h5", lambda p: truncated(p, images=IMAGES), r"a\.h5 is not a complete HDF5 file"),
    "truncated safetensors": (
        "a.safetensors",
        lambda p: truncated(p, images=IMAGES),
        r"not a complete safetensors file",
    ),
    "empty file": ("a.safetensors", lambda p: p.touch(), r"not a complete safetensors file"),
    "no images": ("a.safetensors", lambda p: st(p, x=IMAGES), r"no tensor named images"),
    "no datasets": ("a.h5", lambda p: h5(p, y=LABELS), r"no dataset images of its own"),
    "wrong dtype": ("a.h5", lambda p: h5(p, images=IMAGES.astype(np.float64)), r"are float64; float32"),
    "wrong dtype, safetensors": (
        "a.safetensors",
        lambda p: st(p, images=IMAGES.astype(np.float16)),
        r"are F16; float32",
    ),
    "wrong shape": ("a.h5", lambda p: h5(p, images=IMAGES[:, :2]), r"shape \(4, 2, 48, 48\); \(N, 3, H, W\)"),
    "no rows": ("a.h5", lambda p: h5(p, images=IMAGES[:0]), r"holds no patches"),
    "too small": ("a.h5", lambda p: h5(p, images=IMAGES[..., :31, :]), r"31x48; at least 32x32"),
    "NaN": ("a.h5", lambda p: h5(p, images=put(IMAGES, (2, 0, 0, 0), np.nan), labels=LABELS), r"row 2 of .*NaN"),
    "above 1": ("a.safetensors", lambda p: st(p, images=IMAGES * 255, labels=LABELS), r"row 0 of .*outside \[0, 1\]"),
    "below 0": ("a.h5", lambda p: h5(p, images=put(IMAGES, 1, -0.1), labels=LABELS), r"row 1 of .*outside \[0, 1\]"),
    "no labels": ("a.h5", lambda p: h5(p, images=IMAGES), r"has no labels; add"),
    "count": (
        "a.h5",
        lambda p: h5(p, images=IMAGES, labels=LABELS[:3]),
        r"4 images and 3 labels; the counts must match",
    ),
    "label values": ("a.h5", lambda p: h5(p, images=IMAGES, labels=LABELS + 1), r"not all 0 or 1"),
    "label type": ("a.h5", lambda p: h5(p, images=IMAGES, labels=LABELS * 0.5), r"labels in .* is float64"),
    "large chunks": (
        "a.h5",
        large_chunks,
        r"images in .* has chunks of 65 MiB, .* h5repack -l images:CHUNK=16x3x48x48$",
    ),
    "large patches, images": ("d", large_image, r"d are 9400x9400 .* tiles .* or give --max-pixels 88360000$"),
    "large patches, h5": ("a.h5", large_rows, r"a\.h5 are 9400x9400 .* tiles .* or give --max-pixels 88360000$"),
    "external link": ("a.h5", linked, r"no dataset images of its own"),
    "external storage": ("a.h5", stored_outside, r"external and virtual datasets are not read"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(case, advdiff, classifier, tmp_path):
    name, make, message = CASES[case]
    data, out = tmp_path / "in" / name, tmp_path / "out" / "adv.safetensors"
    data.parent.mkdir()
    out.parent.mkdir()
    make(data)
    result = advdiff("attack", data, "-c", classifier, "-o", out, "--steps", 1, code=1)
    assert result.out == ""
    refused(result.err, message)
    assert not out.exists()


def refused(err, message):
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert re.search(r"^advdiff: error: .*" + message, lines[0]), lines[0]


@pytest.mark.parametrize("command", ["predict", "attack", "evaluate", "purify"])
def test_large_patches_are_computed_when_asked_for(command, advdiff, classifier, ddpm, tmp_path):
    data, out = tmp_path / "in" / "0" / "a.png", tmp_path / "out"
    data.parent.mkdir(parents=True)
    Image.new("RGB", (60, 70)).save(data)
    models = ["-m", ddpm, "--t-star", 0.1] if command == "purify" else ["-c", classifier]
    name = [] if command == "evaluate" else ["-o", out.with_suffix(".csv" if command == "predict" else ".h5")]
    run = [command, tmp_path / "in", *models, *name]
    told = advdiff(*run, "--max-pixels", 4199, code=1).err
    refused(told, r".* are 70x60 and would need much memory: .* at most 4199 pixels, or give --max-pixels 4200$")
    assert advdiff(*run, "--max-pixels", 4200, "--json").json


def test_large_patches_are_not_trained_on(advdiff, tmp_path):
    large_image(tmp_path / "d")
    told = advdiff("train-ddpm", tmp_path / "d", "-o", tmp_path / "m", code=1).err
    refused(told, r".* are 9400x9400 .* tiles of at most 4194304 pixels$")


def test_a_number_of_patches_that_no_disk_holds(advdiff, tmp_path):
    told = advdiff("synthesize", "-n", 99999999999, "-o", tmp_path / "a.h5", code=2).err
    assert "less than or equal to 1000000" in " ".join(told.replace("│", "").split())


@pytest.mark.parametrize("place", ["/", "."])
def test_information_about_a_place_without_a_name(place, advdiff, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("advdiff_cli.data.image_folder.os.walk", lambda *_, **__: [])  # not the whole disk
    refused(advdiff("info", place, code=1).err, f"no images .* in {re.escape(place)}$")


def test_a_corrupt_image_in_a_set_names_itself(advdiff, classifier, tmp_path):
    folder = tmp_path / "in" / "0"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    result = advdiff("attack", tmp_path / "in", "-c", classifier, "-o", tmp_path / "o.h5", "--steps", 1, code=1)
    refused(result.err, r".*b\.png (cannot be decoded|is not an image)")
    assert not (tmp_path / "o.h5").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-c", "nonesuch"], "no classifier is called nonesuch"),
        (["-o", "out.png"], r"written as \.safetensors or \.h5"),
        (["--limit", "2", "--range", "99:"], "no patches selected"),
        (["--method", "fgsm", "--steps", "3"], "does not apply to --method fgsm"),
        (["--eps", "0"], "--eps must be above 0"),
        (["--eps", "2"], "did you mean 2/255"),
        (["--norm", "l2"], "--norm l2 needs --eps"),
        (["-o", "nowhere/adv.h5"], "No such file or directory|Unable to"),
        (["--shard", "7/9"], "--shard 7/9 is empty"),
        (["--compile"], "--compile: this attack takes no gradient of a U-Net"),
        (["--defense", "noise", "--t-star", "0.1", "--compile"], "--compile: this attack takes no gradient of a U-Net"),
    ],
)
def test_settings_that_cannot_be(extra, message, advdiff, classifier, test_x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = advdiff("attack", test_x, "-c", classifier, "-o", "adv.h5", "--steps", 1, "--limit", 4, *extra, code=1)
    refused(result.err, f".*({message})")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict X -m pcam-ddpm --draws 3 -o p.csv", "even 3 draws for one class are not decided"),
        ("predict X --draws 3 -o p.csv", "--draws is about a defense's noise"),
        ("predict X --t-star 0.1 -o p.csv", "need a defense"),
        ("evaluate X --draws 3", "--draws is about a defense's noise"),
        ("evaluate X -m pcam-ddpm --fidelity", "name the clean set, then what was made of it"),
        ("attack X --gradient bpda -o a.h5", "a defense"),
        ("attack X -m pcam-ddpm --gradient blind --eot 2 -o a.h5", "eot"),
        ("attack X -m pcam-ddpm --precision fp16 -o a.h5", "gradients underflow"),
        ("attack X --compile -o a.h5", "takes no gradient of a U-Net"),
        ("certify X --precision bf16 -o c.csv", "rounding of a noised patch is not a part of the proof"),
        ("robustness X -m pcam-ddpm --only nonesuch -o s", "there is no such row"),
        ("robustness X -m pcam-ddpm --only pgd --batch-size auto -o s", "must use the same batch size"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(command, message, advdiff, test_x, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("advdiff_cli.models.registry.load_frozen_classifier", loaded)
    monkeypatch.setattr("advdiff_cli.purification.defense.build_defense", loaded)
    name, _, *options = command.split()
    refused(advdiff(name, test_x, "-c", "pcam-resnet18", *options, code=1).err, f".*{message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--t-star", "0.4"], r"t\* = 0\.4 is above max_t = 0\.3"),
        (["-m", "nonesuch"], "no diffusion model is called nonesuch"),
        (["--t-star", "0.01", "--sampler-steps", "20"], "more than the 10 noise levels"),
        (["-o", "folder"], "give a .safetensors or .h5 file as --out"),
    ],
)
def test_purify_settings_that_cannot_be(extra, message, advdiff, ddpm, test_x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = advdiff("purify", test_x, "-m", ddpm, "-o", "pure.h5", "--limit", 2, *extra, code=1)
    assert len([line for line in result.err.splitlines() if "error:" in line]) == 1
    refused(result.err.splitlines()[-1], f".*({message})")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adv.h5.part", "adv.h5.part.rows", ".adv.h5.lock"])
def test_links_in_the_place_of_work_are_not_written_through(name, advdiff, classifier, test_x, tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "adv.h5"
    precious.write_text("mine")
    (tmp_path / name).symlink_to(precious)
    command = ["attack", test_x, "-c", classifier, "-o", out, "--steps", 1, "--limit", 1]
    refused(advdiff(*command, code=1).err, ".*symbolic link")
    assert precious.read_text() == "mine"
    (tmp_path / name).unlink()
    out.symlink_to(precious)
    advdiff(*command, "--overwrite")
    assert not out.is_symlink()
    assert precious.read_text() == "mine"


def test_a_link_in_the_place_of_a_training_is_not_written_through(advdiff, test_x, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d.part").symlink_to(tmp_path / "elsewhere")
    command = ["train-ddpm", test_x, "--preset", "tiny", "--steps", 1, "--batch-size", 2, "-o", tmp_path / "d"]
    refused(advdiff(*command, code=1).err, ".*symbolic link")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_traceback_is_there_for_who_asks(advdiff, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVDIFF_DEBUG", "1")
    with pytest.raises(AdvdiffError, match="no such file"):
        advdiff("info", tmp_path / "none.h5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder(advdiff, classifier, test_x, tmp_path):
    tmp_path.chmod(0o500)
    result = advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "a.safetensors", "--limit", 1, code=1)
    refused(result.err, "Permission denied.*")


def test_an_output_whose_folder_is_a_file(advdiff, classifier, test_x, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "a.safetensors"
    result = advdiff("attack", test_x, "-c", classifier, "-o", out, "--limit", 1, code=1)
    refused(result.err, "Not a directory.*")


def test_a_full_disk_keeps_what_was_done(advdiff, classifier, test_x, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    command = ["attack", test_x, "-c", classifier, "-o", out, "--steps", 1, "--limit", 6, "--batch-size", 2]
    write, rows = SafetensorsTarget.write, []

    def full(self, start, images):
        if rows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
        rows.append(start)
        write(self, start, images)

    monkeypatch.setattr(SafetensorsTarget, "write", full)
    result = advdiff(*command, code=1)
    refused(result.err, "No space left on device.*")
    assert not out.exists()
    monkeypatch.undo()
    assert advdiff(*command, "--json").json["status"] == "done"


@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
def test_a_disk_without_room_is_told_before_the_work(suffix, advdiff, classifier, test_x, tmp_path, monkeypatch):
    def full(file, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = "hdf5_file" if suffix == ".h5" else "safetensors_file"
    monkeypatch.setattr(f"advdiff_cli.data.{module}.reserve", full)
    result = advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / f"a{suffix}", "--limit", 2, code=1)
    refused(result.err, "No space left on device.*")
    assert list(tmp_path.iterdir()) == []


def test_hdf5_that_fails_while_writing_is_one_line(advdiff, classifier, test_x, tmp_path, monkeypatch):
    def fails(self, where, what):
        raise RuntimeError("Unable to write (errno = 28)")

    monkeypatch.setattr(h5py.Dataset, "__setitem__", fails)
    result = advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "a.h5", "--limit", 2, "--steps", 1, code=1)
    refused(result.err, r"cannot write .*a\.h5\.part \(Unable to write.*")
    assert not (tmp_path / "a.h5").exists()


def test_options_that_do_not_fit_the_data(advdiff, classifier, test_x, tmp_path):
    refused(advdiff("evaluate", test_x, "--split", "train", "-c", classifier, code=1).err, "is a file; --split")
    certify = ["certify", test_x, "-c", classifier, "-o", tmp_path / "c.csv", "--radius"]
    refused(advdiff(*certify, "1e9", code=1).err, r"--radius 1e\+09 is longer")
    refused(advdiff("evaluate", test_x, "--labels", "x.csv", "-c", classifier, code=1).err, "holds its own labels")
    assert "shuffle-seed" in advdiff("evaluate", test_x, "--shuffle-seed", "-1", "-c", classifier, code=2).err
    assert "max-t" in advdiff("train-ddpm", test_x, "--max-t", "300", "-o", tmp_path / "d", code=2).err
    for rate in (0, -1):
        result = advdiff("train-ddpm", test_x, "--learning-rate", rate, "-o", tmp_path / "d", code=1)
        refused(result.err, f"--learning-rate must be above 0 and finite, not {rate}")
    for i, size in enumerate((48, 64)):
        (tmp_path / "in" / "0").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(tmp_path / "in" / "0" / f"{i}.png")
    refused(advdiff("evaluate", tmp_path / "in", "-c", classifier, code=1).err, "differ in size")


def test_unlabeled_valid_is_told_before_training(advdiff, test_x, tmp_path):
    h5(tmp_path / "v.h5", images=IMAGES)
    result = advdiff("train-classifier", test_x, "--valid", tmp_path / "v.h5", "-o", tmp_path / "c", code=1)
    refused(result.err, r".*v\.h5 has no labels")
    assert not (tmp_path / "c.part").exists()
    result = advdiff(
        "train-ddpm", test_x, "--valid", tmp_path / "v.h5", "--preset", "paper", "-o", tmp_path / "d", code=1
    )
    refused(result.err, "48x48 do not fit preset paper: sides must be multiples of 32")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--norm", "l2", "--eps", "1e300"], "longer than any change of a patch"),
        (["--defense", "noise", "--t-star", "nan"], r"t\* = nan is not in"),
        (["-m", "synthetic-ddpm", "--t-star", "nan"], r"t\* = nan is not in"),
        (["-m", "synthetic-ddpm", "--t-star", "inf"], r"t\* = inf is not in"),
    ],
)
def test_numbers_that_are_none(extra, message, advdiff, classifier, test_x, tmp_path):
    refused(
        advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "a.h5", "--limit", 4, *extra, code=1).err, message
    )


@pytest.mark.parametrize("extra", [["--step-size", "inf"], ["--eps", "nan"], ["--seed", "9" * 23], ["--shard", "²/3"]])
def test_numbers_that_are_refused_as_usage(extra, advdiff, classifier, test_x, tmp_path):
    advdiff("attack", test_x, "-c", classifier, "-o", tmp_path / "a.h5", *extra, code=2)
    assert list(tmp_path.iterdir()) == []


def test_fidelity_of_one_patch_has_no_interval(advdiff, classifier, test_x, tmp_path):
    advdiff("purify", test_x, "--defense", "noise", "--limit", 1, "-o", tmp_path / "p.h5")
    sets = ["evaluate", test_x, tmp_path / "p.h5", "-c", classifier, "--limit", 1, "--fidelity"]
    found = advdiff(*sets, "--json").json["fidelity"][0]
    assert (found["ssim"]["low"], found["ssim"]["high"]) == (None, None)
    assert "[no interval]" in advdiff(*sets).out


def test_a_draw_number_that_no_memory_holds(advdiff, classifier, test_x, tmp_path):
    table = tmp_path / "p.csv"
    advdiff("evaluate", test_x, "-c", classifier, "--limit", 2, "--predictions", table)
    lines = table.read_text().splitlines()
    cells = lines[-1].split(",")
    cells[5] = "1000000000"
    table.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    (tmp_path / "q.csv").write_bytes(table.read_bytes())
    assert "is damaged" in advdiff("compare", table, tmp_path / "q.csv", code=1).err


def test_no_input_is_replaced(advdiff, classifier, ddpm, patches, tmp_path):
    own = tmp_path / "own.h5"
    advdiff("synthesize", "-n", 4, "-o", own)
    pcam = tmp_path / "a_x.h5"
    h5(pcam, x=np.full((4, 48, 48, 3), 128, np.uint8))
    h5(tmp_path / "a_y.h5", y=LABELS.reshape(4, 1, 1, 1))
    folder, labels = patches / "images" / "test", tmp_path / "l.csv"
    labels.write_text("file,label\n" + "".join(f"{f.relative_to(folder)},1\n" for f in folder.rglob("*.*")))
    proved = tmp_path / "proved.csv"
    few = ["--limit", 2, "-c", classifier]
    noise = ["--defense", "noise", "--t-star", 0.3]
    certify = ["certify", folder, "--labels", labels, *few, *noise, "--radius", 0, "--n", 8, "-o", proved]
    advdiff(*certify)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    evaluate = ["evaluate", folder, "--labels", labels, *few, *noise, "--predictions"]
    purify = [*noise, "-o"]
    for command in (
        ["purify", own, *purify, own],
        ["purify", pcam, *purify, pcam],
        ["purify", pcam, *purify, tmp_path / "a_y.h5"],
        ["attack", own, "-c", classifier, "--steps", 1, "-o", own],
        ["merge", own, "-o", own],
        ["merge", pcam, "-o", tmp_path / "a_y.h5"],
        ["evaluate", pcam, "-c", classifier, "--predictions", tmp_path / "a_y.h5"],
        [*evaluate, labels],
        [*evaluate, proved, "--certificates", proved],
        [*certify, "--tsv", labels],
    ):
        refused(advdiff(*command, "--overwrite", code=1).err, "is an input of this command, which is never replaced")
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_an_attack_does_not_go_on_from_a_purified_set(advdiff, classifier, ddpm, test_x, tmp_path):
    out = tmp_path / "p.h5"
    advdiff("purify", test_x, "--defense", "noise", "--t-star", 0.3, "--limit", 2, "-o", out)
    attack = [
        "attack",
        test_x,
        "-c",
        classifier,
        "--defense",
        "noise",
        "--t-star",
        0.3,
        "--limit",
        2,
        "--steps",
        1,
        "-o",
        out,
    ]
    refused(advdiff(*attack, code=1).err, "p\\.h5 was made with other settings .*command")


def test_the_set_that_differs_is_named(advdiff, classifier, ddpm, test_x, tmp_path):
    evaluate = ["evaluate", test_x, "-c", classifier, "--limit", 2, "--predictions", tmp_path / "p.csv"]
    advdiff(*evaluate)
    other = tmp_path / "other" / test_x.name
    other.parent.symlink_to(test_x.parent)
    refused(
        advdiff("evaluate", other, *evaluate[2:], code=1).err, r"made with other settings \(data\.0\.name .* -> .*\)"
    )
