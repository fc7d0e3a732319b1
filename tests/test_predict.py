"""`advdiff predict`: decisions for patches with and without labels, as evaluate makes them."""

import csv
import shutil

import pytest

from advdiff_cli.data.patches import open_patches

THROUGH = ["--t-star", "0.1", "--sampler-steps", 1]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tiles(patches, tmp_path):
    """A folder of patches without labels, with a subfolder."""
    files = sorted((patches / "images" / "test").rglob("*.jpg"))[:20]
    for i, file in enumerate(files):
        folder = tmp_path / "tiles" / ("a" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    return tmp_path / "tiles"


def test_a_folder_without_labels(advdiff, tiles, classifier, ddpm, tmp_path):
    out = tmp_path / "d.csv"
    told = advdiff("predict", tiles, "-c", classifier, "-m", ddpm, *THROUGH, "-o", out, "--json").json
    lines = table(out)
    assert [line["name"] for line in lines] == open_patches(tiles).keys
    assert list(lines[0]) == ["name", "decision", "p1", "share", "abstain"]
    abstained = [line for line in lines if line["abstain"] == "1"]
    assert told["abstained"] == len(abstained)
    assert told["patches"] == 20 == sum(told["decided"].values()) + len(abstained)
    for line in lines:
        share = float(line["share"])
        assert 0.5 < share <= 1
        assert (line["abstain"] == "1") == (share < 10 / 11 - 1e-6)  # 10 of 11 draws: p = 0.012
    refused = advdiff("evaluate", tiles, "-c", classifier, code=1).err
    assert "--labels FILE.csv" in refused
    assert "advdiff predict needs no labels" in refused


def test_decisions_are_those_of_evaluate(advdiff, test_x, classifier, ddpm, tmp_path):
    rows = [test_x, "-c", classifier, "-m", ddpm, *THROUGH, "--limit", 20]
    judged = advdiff("evaluate", *rows, "--predictions", tmp_path / "p.csv", "--json").json["sets"][0]
    advdiff("predict", *rows, "-o", tmp_path / "d.csv")
    lines, labels = table(tmp_path / "d.csv"), open_patches(test_x).labels[:20]
    correct = [int(line["decision"]) == label for line, label in zip(lines, labels, strict=True)]
    assert sum(correct) / 20 == judged["vote_11"]["value"]
    draws = {}
    for line in table(tmp_path / "p.csv"):
        draws.setdefault(line["row"], []).append(float(line["p1"]))
    for line in lines:
        assert float(line["p1"]) == pytest.approx(sum(draws[line["name"]]) / 11, abs=1e-8)


def test_a_classifier_alone_never_abstains(advdiff, test_x, classifier, tmp_path):
    out = tmp_path / "d.csv"
    advdiff("predict", test_x, "-c", classifier, "-o", out)
    lines = table(out)
    assert {(line["share"], line["abstain"]) for line in lines} == {("1", "0")}
    assert [int(line["decision"]) for line in lines] == [float(line["p1"]) > 0.5 for line in lines]
    told = advdiff("predict", test_x, "-c", classifier, "--draws", 3, "-o", tmp_path / "e.csv", code=1).err
    assert "--draws is about a defense's noise" in told


@pytest.mark.cpu  # a batch of a GPU holds all of these patches
def test_shards_and_a_killed_run_give_the_same_file(advdiff, test_x, classifier, ddpm, tmp_path):
    command = ["predict", test_x, "-c", classifier, "-m", ddpm, *THROUGH, "--draws", 6]
    advdiff(*command, "-o", tmp_path / "whole.csv")
    parts = [tmp_path / f"part{i}.csv" for i in range(3)]
    for i, part in enumerate(parts):
        advdiff(*command, "-o", part, "--shard", f"{i}/3")
        assert "up to date" in advdiff(*command, "-o", part, "--shard", f"{i}/3").err
    advdiff("merge", *parts[::-1], "-o", tmp_path / "merged.csv")
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert "up to date" in advdiff(*command, "-o", tmp_path / "merged.csv").err
    advdiff(*command, "-o", tmp_path / "p.csv", "--shard", "0/3")
    assert "other settings" in advdiff(*command, "-o", tmp_path / "p.csv", "--shard", "1/3", code=1).err
    for shard in ("1/3", "1/3"):  # of another shard, and of the same one, which is made again
        told = advdiff(*command, "-o", tmp_path / "p.csv", "--shard", shard, "--overwrite", "--json")
        assert told.json["status"] == "done"
    assert "other settings" in advdiff(*command, "-o", tmp_path / "merged.csv", "--shard", "1/3", code=1).err
    assert "other settings (alpha" in advdiff(*command, "-o", tmp_path / "whole.csv", "--alpha", "0.1", code=1).err


def test_what_cannot_be_is_told(advdiff, test_x, tiles, classifier, ddpm, tmp_path):
    command = ["predict", test_x, "-c", classifier, "-m", ddpm, *THROUGH]
    assert "are written as .csv" in advdiff(*command, "-o", tmp_path / "d.h5", code=1).err
    few = advdiff(*command, "--draws", 5, "-o", tmp_path / "d.csv", code=1).err
    assert "give at least 6 draws" in few
    for alpha in ("0", "1.5", "nan"):
        told = advdiff(*command, "--alpha", alpha, "-o", tmp_path / "d.csv", code=1).err
        assert "--alpha must be above 0 and at most 1" in told
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n" + "".join(f"{name},1\n" for name in open_patches(tiles).keys))
    before = labels.read_bytes()
    told = advdiff("predict", tiles, "--labels", labels, "-c", classifier, "-o", labels, "--overwrite", code=1).err
    assert "is an input of this command" in told
    assert labels.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.csv", "tiles"]


def test_info_tells_of_a_table(advdiff, test_x, classifier, tmp_path):
    out = tmp_path / "d.csv"
    advdiff("predict", test_x, "-c", classifier, "-o", out, "--limit", 3)
    told = advdiff("info", out, "--json").json
    assert (told["kind"], told["n"]) == ("table", 3)
    assert told["provenance"]["recipe"]["command"] == "predict"
    assert "predict: draws 1" in advdiff("info", out).out
