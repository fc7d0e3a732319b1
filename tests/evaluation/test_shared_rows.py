"""Results are matched by the patches that they are of: nothing is told of patches that took another's place."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rows import origins
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.row_fingerprints import as_text, fingerprint_rows, from_texts, shared_rows

N = 130
SPARED = set(np.linspace(0, N - 1, 64).round().astype(int).tolist())
"""Rows that a sample of the set would look at, and that stay as they are."""
REPLACED = sorted(set(range(N)) - SPARED)
DEFENSE = ["--defense", "noise", "--t-star", "0.2"]


@pytest.fixture(params=["file", "folder"])
def sets(request, tmp_path):
    """Two sets of one size, one layout, the same names and labels; most patches of the second one are others."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 3, 32, 32), np.uint8)
    others = images.copy()
    others[REPLACED] = rng.integers(0, 256, (len(REPLACED), 3, 32, 32), np.uint8)
    paths = []
    for name, pixels in (("honest", images), ("deceiving", others)):
        if request.param == "file":
            paths.append(tmp_path / f"{name}.safetensors")
            save_file({"images": pixels, "labels": np.arange(N) % 2}, paths[-1])
            continue
        paths.append(tmp_path / name)
        for i, one in enumerate(pixels):
            (paths[-1] / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(one.transpose(1, 2, 0)).save(paths[-1] / str(i % 2) / f"{i:03}.png")
    return paths


def replaced(sets):
    """Return how many patches of the second set are not those of the first one."""
    first, second = (open_patches(path).read(range(N)).numpy() for path in sets)
    return int((first != second).any((1, 2, 3)).sum())


def test_certificates_prove_nothing_of_other_patches(advdiff, sets, classifier, tmp_path):
    honest, deceiving = sets
    assert replaced(sets) == len(REPLACED)
    proved = tmp_path / "proved.csv"
    certify = ["certify", honest, "-c", classifier, *DEFENSE, "--n0", 5, "--n", 20, "--radius", 0, "-o", proved]
    advdiff(*certify)
    evaluate = ["-c", classifier, *DEFENSE, "--draws", 1, "--certificates", proved]
    own = advdiff("evaluate", honest, *evaluate, "--json")
    assert own.json["certified"]["n"] == N
    assert "others" not in own.err
    told = advdiff("evaluate", deceiving, *evaluate, "--json")
    assert told.json["certified"]["n"] == len(SPARED)
    assert f"certifies {len(SPARED)} of the {N} patches" in told.err
    nothing = tmp_path / "nothing.safetensors"
    save_file({"images": np.zeros((N, 3, 32, 32), np.uint8), "labels": np.arange(N) % 2}, nothing)
    assert "certifies other patches than" in advdiff("evaluate", nothing, *evaluate, code=1).err


def test_predictions_of_other_patches_are_not_compared(advdiff, sets, classifier, tmp_path):
    tables = [tmp_path / "one.csv", tmp_path / "other.csv"]
    for path, table in zip(sets, tables, strict=True):
        advdiff("evaluate", path, "-c", classifier, "--predictions", table)
    (pair,) = advdiff("compare", *tables, "--json").json["comparisons"]
    assert pair["n"] == len(SPARED)


def test_an_attack_is_compared_with_the_patches_that_it_was_made_from(advdiff, sets, classifier, tmp_path):
    honest, deceiving = sets
    adv = tmp_path / "adv.h5"
    advdiff("attack", honest, "-c", classifier, "--method", "fgsm", "-o", adv)
    for clean, shared in ((honest, N), (deceiving, len(SPARED))):
        found = advdiff("evaluate", clean, adv, "-c", classifier, "--fidelity", "--json").json
        assert [c["n"] for c in found["comparisons"]] == [shared]
        assert [f["n"] for f in found["fidelity"]] == [shared]


def test_a_row_is_found_again_wherever_it_stands(advdiff, sets, classifier, tmp_path):
    honest, _ = sets
    if honest.is_dir():
        shutil.copy(sorted(honest.rglob("*.png"))[-1], honest / "0" / "000a.png")  # all later row numbers change
        first, second = open_patches(honest), open_patches(f"{honest}/1/*.png")
        a, b = shared_rows((first.origins(), first.index), (second.origins(), second.index))
        assert [first.keys[i].rpartition("/")[2] for i in a[1:]] == [second.keys[j] for j in b[1:]]
        assert len(b) == len(second)


def test_origins_that_are_mended_are_used(advdiff, sets, classifier, tmp_path):
    """What another program attacked is compared once its origins are told, although its patches are the same."""
    clean, adv, table = sets[0], tmp_path / "adv.safetensors", tmp_path / "p.csv"
    images = open_patches(clean)
    tensors = {"images": images.read(range(N)).numpy() / 2, "labels": images.labels, "index": images.index}
    save_file(tensors, adv)
    evaluate = ["evaluate", clean, adv, "-c", classifier, "--predictions", table, "--json"]
    told = advdiff(*evaluate)
    assert "is not compared with it" in told.err and not told.json["comparisons"]
    save_file({**tensors, "origin_sha256": images.origins()}, adv)
    assert advdiff(*evaluate, "--overwrite").json["comparisons"][0]["n"] == N


@pytest.mark.parametrize("command", ["attack", "purify"])
def test_a_set_that_was_made_from_others_and_does_not_tell_them_is_refused(
    command, advdiff, sets, classifier, tmp_path
):
    made = tmp_path / "made.safetensors"
    options = ["-c", classifier, "--method", "fgsm"] if command == "attack" else DEFENSE
    advdiff(command, sets[0], *options, "-o", made)
    with safe_open(made, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(made)
    del tensors["origin_sha256"]
    save_file(tensors, made, metadata)
    told = advdiff("evaluate", sets[0], made, "-c", classifier, code=1).err
    assert "made.safetensors does not tell from which patches it was made" in told


def test_equal_patches_with_different_labels_are_paired_by_index():
    patches, labels = np.array([0, 0, 1, 0]), np.array([0, 1, 0, 1])
    for chosen in ([1], [3, 1], [2, 1, 0]):
        a, b = shared_rows((origins(patches), np.arange(4)), (origins(patches[chosen]), np.array(chosen)))
        assert sorted(a) == sorted(chosen)
        np.testing.assert_array_equal(labels[a], labels[chosen][b])


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 5), max_size=20), st.randoms())
def test_equal_rows_are_paired_one_by_one(first, second, random):
    index, other = (np.array(random.sample(range(30), len(rows)), np.int64) for rows in (first, second))
    a, b = shared_rows((origins(first), index), (origins(second), other))
    assert [first[i] for i in a] == [second[j] for j in b]
    assert len(set(a.tolist())) == len(set(b.tolist())) == len(a)
    assert len(a) == sum(min(first.count(k), second.count(k)) for k in range(6))
    assert a.tolist() == sorted(a)


def test_a_fingerprint_is_of_pixels_size_and_type():
    rows = np.arange(2 * 3 * 32 * 64, dtype=np.uint8).reshape(2, 3, 32, 64)
    found = fingerprint_rows(rows)
    assert np.array_equal(from_texts([as_text(one) for one in found]), found)
    others = [rows[1:] + 1, rows[1:].reshape(1, 3, 64, 32), rows[1:].astype(np.float32)]
    assert len({as_text(fingerprint_rows(x)[-1]) for x in (rows, *others)}) == 4
