"""`advdiff certify`: the same rows whatever the order, range, shard or interruption, and tables for other tools."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from advdiff_cli.certification.bounds import certified_radius, clopper_pearson
from advdiff_cli.certification.summary import certificate_curves
from advdiff_cli.data.patches import open_patches

N = 6


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(path):
    """Return the rows by index, without the seconds that they took."""
    return {line["index"]: {k: v for k, v in line.items() if k != "seconds"} for line in table(path)}


@pytest.fixture
def command(test_x, classifier):
    noise = ["--defense", "noise", "--t-star", "0.1", "--batch-size", 8]
    return ["certify", test_x, "-c", classifier, *noise, "--n", 30, "--radius", "0.05", "--radius", 0]


def test_the_default_noise_level_is_that_of_the_model_for_certificates(advdiff, test_x, classifier, tmp_path):
    base = [test_x, "-c", classifier, "-m", "pcam-ddpm", "--limit", 1]
    certify = ["certify", *base, "--n0", 2, "--n", 2, "-o", tmp_path / "c.csv", "--json"]
    assert advdiff(*certify).json["parameters"]["t_star"] == 0.3
    assert "up to date" in advdiff(*certify).err  # known without the model
    predicted = advdiff("predict", *base, "--draws", 6, "-o", tmp_path / "p.csv").err
    assert "t* 0.2," in predicted


def test_the_draws_of_a_patch_are_told_as_they_were(advdiff, test_x, tmp_path):
    certify = ["certify", test_x, "-c", "synthetic-classifier", "--defense", "noise", "--n0", 2]
    told = advdiff(
        *certify, "--t-star", 0.3, "--limit", 12, "--n", 99, "--radius", 0.1, "-o", tmp_path / "some.csv"
    ).out
    draws = [int(line["draws"]) for line in table(tmp_path / "some.csv")]
    assert min(draws) < max(draws)
    assert f"{sum(draws) / 12:.1f} draws a patch on average ({min(draws)} to {max(draws)})" in told
    assert "2 patches, 8 draws each" in advdiff(*certify, "--n", 6, "--limit", 2, "-o", tmp_path / "all.csv").out


def test_order_range_and_shard(advdiff, command, ddpm, tmp_path):
    command = [*command, "--defense", "ddpm", "-m", ddpm, "--sampler-steps", 2]
    whole = tmp_path / "whole.csv"
    told = advdiff(*command, "--limit", N, "-o", whole, "--json").json
    expected = rows_of(whole)
    assert len(expected) == N == told["n"]
    draws = [int(line["draws"]) for line in table(whole)]
    assert (told["draws"], told["draws_range"]) == (sum(draws), [min(draws), max(draws)])
    ranges = {}
    for a, b in ((0, 3), (3, N)):
        advdiff(*command, "--range", f"{a}:{b}", "-o", tmp_path / f"r{a}.csv")
        ranges |= rows_of(tmp_path / f"r{a}.csv")
    assert ranges == expected
    advdiff(*command, "--shuffle-seed", 5, "--limit", 10, "-o", tmp_path / "shuffled.csv")
    shuffled = rows_of(tmp_path / "shuffled.csv")
    assert list(shuffled) != sorted(shuffled, key=int)
    shared = expected.keys() & shuffled
    assert shared
    assert {k: shuffled[k] for k in shared} == {k: expected[k] for k in shared}
    shards = [tmp_path / f"s{i}.csv" for i in (1, 0)]
    for i, shard in zip((1, 0), shards, strict=True):
        advdiff(*command, "--limit", N, "--shard", f"{i}/2", "-o", shard)
    advdiff("merge", *shards, "-o", tmp_path / "merged.csv")
    assert rows_of(tmp_path / "merged.csv") == expected
    assert "up to date" in advdiff(*command, "--limit", N, "-o", tmp_path / "merged.csv").err
    assert "n 30" in advdiff("info", whole).out


def test_kill_and_resume(advdiff, command, tmp_path):
    advdiff(*command, "-o", tmp_path / "whole.csv")
    out, work = tmp_path / "killed.csv", tmp_path / "killed.csv.part"
    line = [sys.executable, "-m", "advdiff_cli", *map(str, command), "-o", str(out)]
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (work.exists() and work.read_bytes().count(b"\n") > 2):
        time.sleep(0.05)
    time.sleep(random.Random(0).random() / 2)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    advdiff(*command, "-o", out)
    assert rows_of(out) == rows_of(tmp_path / "whole.csv")


def test_exactly_n_draws(advdiff, test_x, classifier, tmp_path):
    """Radii are Cohen et al.'s: Clopper-Pearson on draws that did not choose the class."""
    base = ["certify", test_x, "-c", classifier, "--defense", "noise", "--t-star", "0.1", "--limit", N]
    told = advdiff(*base, "--n0", 5, "--n", 30, "-o", tmp_path / "c.csv", "--tsv", tmp_path / "c.tsv", "--json").json
    lines = table(tmp_path / "c.csv")
    for line in lines:
        assert line["draws"] == "35"
        bound = clopper_pearson(int(line["successes"]), 30, 0.001)
        assert float(line["radius"]) == certified_radius(bound, told["sigma"])
        assert (line["abstain"] == "1") == (bound <= 0.5)
    assert told["parameters"]["dimension"] == 3 * 96 * 96
    known = {(c["norm"], c["eps"]): c for c in told["certified"]}
    assert set(known) == {*(("linf", k / 255) for k in (0.5, 1, 2)), *(("l2", r) for r in (0.25, 0.5, 1.0))}
    correct = [float(line["radius"]) for line in lines if line["decision"] == line["label"] and line["abstain"] == "0"]
    assert known["linf", 1 / 255]["l2"] == pytest.approx((3 * 96 * 96) ** 0.5 / 255)
    assert known["linf", 1 / 255]["value"] == sum(r >= known["linf", 1 / 255]["l2"] for r in correct) / N
    assert told["vote_accuracy"]["value"] == sum(line["decision"] == line["label"] for line in lines) / N

    header, *rows = [line.split("\t") for line in (tmp_path / "c.tsv").read_text().splitlines()]
    assert header == ["idx", "label", "predict", "radius", "correct", "time"]
    for row, line in zip(rows, lines, strict=True):
        predicted = "-1" if line["abstain"] == "1" else line["decision"]
        assert row[:3] == [line["index"], line["label"], predicted]
        assert float(row[3]) <= float(line["radius"]) < float(row[3]) + 2e-6
        assert row[4] == str(int(predicted == line["label"]))
        assert row[5].startswith("0:00:0")
    again = advdiff(*base, "--n0", 5, "--n", 30, "--tsv", tmp_path / "c.tsv", "-o", tmp_path / "c.csv")
    assert "up to date" in again.err
    assert "other settings" in advdiff(*base, "--n", 40, "-o", tmp_path / "c.csv", code=1).err


def test_a_size_stops_early(advdiff, test_x, classifier, tmp_path):
    base = ["certify", test_x, "-c", classifier, "--defense", "noise", "--t-star", "0.1", "--limit", N, "--n", 2000]
    told = advdiff(*base, "--eps", "0.05/255", "-o", tmp_path / "c.csv", "--json").json
    (size,) = told["certified"]
    assert (size["norm"], size["eps"]) == ("linf", 0.05 / 255)
    lines = table(tmp_path / "c.csv")
    sure = [line for line in lines if int(line["draws"]) - 20 == int(line["successes"])]
    assert sure
    assert all(int(line["draws"]) < 100 and float(line["radius"]) >= size["l2"] for line in sure)
    far = advdiff(*base, "--eps", "8/255", "-o", tmp_path / "far.csv", "--json")  # r / sigma is 51
    assert "cannot be proved at sigma" in far.err
    assert far.json["certified"][0]["value"] == 0
    text = advdiff(*base, "--eps", "0.05/255", "-o", tmp_path / "c.csv").out
    assert "0.05/255" in text
    assert "the vote over infinitely many draws" in text


def test_a_folder_without_labels_and_sound_noise(advdiff, patches, classifier, tmp_path):
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for file in sorted((patches / "images" / "test").rglob("*.jpg"))[:3]:
        shutil.copy(file, tiles)
    base = ["certify", tiles, "-c", classifier, "--defense", "noise", "--n0", 5, "--n", 20, "--sound"]
    told = advdiff(*base, "-o", tmp_path / "c.csv", "--json").json
    assert told["vote_accuracy"] is None
    assert [line["name"] for line in table(tmp_path / "c.csv")] == open_patches(tiles).keys
    assert {line["label"] for line in table(tmp_path / "c.csv")} == {""}
    assert "certified patches %" in advdiff(*base, "-o", tmp_path / "c.csv").out
    refused = advdiff(*base, "-o", tmp_path / "c.csv", "--tsv", tmp_path / "c.tsv", code=1).err
    assert "--labels FILE.csv" in refused
    advdiff(*base, "-o", tmp_path / "bf16.csv", "--precision", "bf16", "--limit", 1)


def test_what_cannot_be_certified_is_told(advdiff, command, ddpm, tmp_path):
    told = {
        "add --sound": [*command, "--precision", "bf16"],
        "--alpha must be at least 1e-12 and below 0.5": [*command, "--alpha", "0.6"],
        "certificates are written as .csv": [*command[:-2], "-o", tmp_path / "c.h5"],
        "exceeds the range of pixels": [*command, "--eps", "2"],
        "longer than any change": [*command, "--radius", "1e9"],
        "above max_t": [*command, "--defense", "ddpm", "-m", ddpm, "--t-star", "0.9"],
    }
    for text, arguments in told.items():
        out = [] if "-o" in arguments else ["-o", tmp_path / "c.csv"]
        assert text in advdiff(*arguments, *out, code=1).err, text
    assert not list(tmp_path.iterdir())
    plan = advdiff(*command, "-o", tmp_path / "c.csv", "--dry-run", "--json").json
    assert (plan["patches"], plan["most_draws"]) == (40, 50)
    assert not list(tmp_path.iterdir())


def test_other_files_are_kept(advdiff, command, tmp_path):
    (tmp_path / "mine.tsv").write_text("mine")
    nowhere, itself = tmp_path / "nowhere" / "c.tsv", tmp_path / "c.csv"
    assert "there is no folder" in advdiff(*command, "-o", tmp_path / "c.csv", "--tsv", nowhere, code=1).err
    assert "is --out itself" in advdiff(*command, "-o", tmp_path / "c.csv", "--tsv", itself, code=1).err
    out = ["--limit", 1, "-o", tmp_path / "c.csv"]
    assert "was not made by this command" in advdiff(*command, *out, "--tsv", tmp_path / "mine.tsv", code=1).err
    assert (tmp_path / "mine.tsv").read_text() == "mine"
    advdiff(*command, *out, "--tsv", tmp_path / "c.tsv")
    other = [*command, "--limit", 1, "--seed", 1, "-o", tmp_path / "d.csv", "--tsv", tmp_path / "c.tsv"]
    assert "was made with other settings (seed" in advdiff(*other, code=1).err
    assert not (tmp_path / "d.csv").exists()
    assert "merge the shards" in advdiff(*other, "--shard", "0/2", code=1).err
    assert "must use the same batch size" in advdiff(*other[:-2], "--shard", "0/2", "--batch-size", "auto", code=1).err
    (tmp_path / "c.csv").write_text("mine")
    assert "was not made by this command" in advdiff(*command, *out, code=1).err


@pytest.mark.parametrize(
    "name", ["c.csv.part", "c.csv.part.rows", "c.csv.advdiff", ".c.csv.lock", ".advdiff.0.part.csv"]
)
def test_names_of_work_files_are_refused_before_the_first_draw(name, advdiff, command, test_x, classifier, tmp_path):
    out = ["--limit", 1, "-o", tmp_path / "c.csv"]
    told = advdiff(*command, *out, "--tsv", tmp_path / name, code=1).err
    assert f"{name} is named as a file that advdiff keeps beside its outputs" in told
    evaluate = ["evaluate", test_x, "-c", classifier, "--limit", 1, "--predictions", tmp_path / name]
    assert "is named as a file that advdiff keeps" in advdiff(*evaluate, code=1).err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def certified(advdiff, test_x, classifier, tmp_path):
    """Tables of two defenses, and the rows that both hold."""
    base = ["certify", test_x, "-c", classifier, "--defense", "noise", "--n", 40, "--n0", 5]
    tables = {name: tmp_path / f"{name}.csv" for name in ("weak", "strong")}
    advdiff(*base, "--t-star", "0.02", "--limit", 12, "-o", tables["weak"])
    advdiff(*base, "--t-star", "0.2", "--limit", 10, "-o", tables["strong"])
    return tables


def test_certified_accuracies_are_compared_in_pairs(advdiff, certified, command, tmp_path):
    compare = ["compare", certified["weak"], certified["strong"]]
    found = advdiff(*compare, "--radius", "0.1", "--json").json
    for told, path in zip(found["sets"], certified.values(), strict=True):
        right = [c for c in table(path) if c["decision"] == c["label"] and c["abstain"] == "0"]
        assert told["accuracy"]["value"] == sum(float(c["radius"]) >= 0.1 for c in right) / told["n"]
    assert [c["n"] for c in found["comparisons"]] == [10]
    assert "give --eps or --radius" in advdiff(*compare, code=1).err
    assert "give --eps or --radius" in advdiff(*compare, "--radius", 1, "--eps", "1/255", code=1).err
    assert "exceeds the range" in advdiff(*compare, "--eps", 2, code=1).err
    assert "must be above 0" in advdiff(*compare, "--radius", "-1", code=1).err
    (tmp_path / "p.csv").write_text("set,origin_sha256,index,row,label,draw,p1\n")
    mixed = advdiff("compare", certified["weak"], tmp_path / "p.csv", "--radius", 1, code=1)
    assert "not one with the other" in mixed.err
    advdiff(*command, "--limit", 12, "-o", tmp_path / "sized.csv")
    told = advdiff("compare", tmp_path / "sized.csv", certified["weak"], "--radius", "0.3", code=1).err
    assert "does not decide --radius 0.3" in told


def test_evaluate_tells_what_is_proved_of_a_set(advdiff, certified, test_x, classifier, tmp_path):
    evaluate = ["evaluate", test_x, "-c", classifier, "--defense", "noise", "--limit", 8, "--draws", 1]
    told = advdiff(*evaluate, "--t-star", "0.2", "--certificates", certified["strong"], "--json").json["certified"]
    assert (told["n"], told["data"]) == (8, str(test_x))
    right = [c for c in table(certified["strong"])[:8] if c["decision"] == c["label"] and c["abstain"] == "0"]
    (quarter,) = (c for c in told["certified"] if c["norm"] == "l2" and c["eps"] == 0.25)
    assert quarter["value"] == sum(float(c["radius"]) >= 0.25 for c in right) / 8
    assert "proved of" in advdiff(*evaluate, "--t-star", "0.2", "--certificates", certified["strong"]).out
    assert "is of another model" in advdiff(*evaluate, "--certificates", certified["strong"], code=1).err
    other = [*evaluate[:-4], "--range", "20:30", "--draws", 1, "--t-star", "0.2"]
    assert "certifies other patches than" in advdiff(*other, "--certificates", certified["strong"], code=1).err
    undefended = ["evaluate", test_x, "-c", classifier, "--limit", 8, "--certificates", certified["strong"]]
    assert "give -m, or --defense noise" in advdiff(*undefended, code=1).err
    adv = tmp_path / "adv.safetensors"
    advdiff("attack", test_x, "-c", classifier, "--limit", 8, "--method", "random", "-o", adv)
    attacked = [evaluate[0], adv, *evaluate[2:], "--t-star", "0.2", "--certificates", certified["strong"]]
    assert "such as those before an attack" in advdiff(*attacked, code=1).err
    certified["weak"].write_text("mine")
    assert "is not as advdiff certify wrote it" in advdiff(*other, "--certificates", certified["weak"], code=1).err


def test_a_report_draws_certified_accuracy(advdiff, certified, command, tmp_path):
    both = [word for name, path in certified.items() for word in ("--certificates", f"{name}={path}")]
    advdiff("report", *both, "-o", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What is proved" in page
    assert "l-inf 2/255" in page
    assert (tmp_path / "report" / "certified.svg").read_text().count("certified (n =") == 2
    sized = tmp_path / "sized.csv"
    advdiff(*command, "--limit", 12, "-o", sized)
    curves = [certificate_curves(path) for path in (certified["strong"], sized)]
    assert curves[0]["curve"][-1]["value"] == 0  # beyond the largest radius
    assert [point["l2"] for point in curves[1]["curve"]] == [0, 0.05]  # nothing is told of other radii
    advdiff("report", "--certificates", f"sized={sized}", "-o", tmp_path / "points")
    twice = ["report", "--certificates", both[1], "--certificates", both[1], "-o", tmp_path / "other"]
    assert "two tables of certificates are called weak" in advdiff(*twice, code=1).err
