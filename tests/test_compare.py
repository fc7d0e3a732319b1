"""`compare`: predictions of several models or defenses, written by `evaluate`, put side by side."""

import itertools

import numpy as np
import pytest
from rows import origins
from scipy.stats import binomtest

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.predictions_csv import read_predictions, write_predictions


@pytest.mark.parametrize("draws", [1, 3])
def test_predictions_are_read_as_they_were_written(tmp_path, draws):
    rng = np.random.default_rng(0)
    sets = [
        EvaluatedSet(
            name,
            origins(rng.permutation(9)[:5]),
            rng.permutation(9)[:5],
            Predictions(rng.integers(2, size=5), rng.random((5, draws))),
        )
        for name in ("clean, of a folder", 'ad"v')
    ]
    write_predictions(tmp_path / "p.csv", [(one, [f"{i}.png" for i in one.index]) for one in sets])
    for one, found in zip(sets, read_predictions(tmp_path / "p.csv"), strict=True):
        assert found.name == one.name
        np.testing.assert_array_equal(found.origins, one.origins)
        np.testing.assert_array_equal(found.index, one.index)
        np.testing.assert_array_equal(found.predictions.labels, one.predictions.labels)
        np.testing.assert_allclose(found.predictions.p1, one.predictions.p1, rtol=1e-8)


@pytest.mark.parametrize("column", [1, 2, 4])  # the origin, the index and the label
def test_draws_of_one_patch_that_disagree_on_it_are_damage(tmp_path, column):
    path, one = (
        tmp_path / "p.csv",
        EvaluatedSet("a", origins([1]), np.arange(1), Predictions([1], np.full((1, 2), 0.5))),
    )
    write_predictions(path, [(one, [0])])
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[column] = {1: "0" * 64, 2: "3", 4: "0"}[column]
    path.write_text("\n".join([*lines[:2], ",".join(cells)]) + "\n")
    with pytest.raises(AdvdiffError, match=r"p\.csv is damaged"):
        read_predictions(path)


def test_defenses_attacked_on_their_own_are_compared_by_place(advdiff, test_x, classifier, ddpm, tmp_path):
    defenses = {
        "noise": ["--defense", "noise", "--t-star", "0.1"],
        "ddpm": ["-m", ddpm, "--t-star", "0.1", "--sampler-steps", 1],
    }
    shares = {}
    for name, defense in defenses.items():
        adv, rows = tmp_path / f"{name}.h5", ["--limit", 8 if name == "noise" else 6]
        advdiff(
            "attack", test_x, *rows, "-c", classifier, *defense, "--steps", 1, "--eot", 2, "--batch-size", 8, "-o", adv
        )
        judge = ["evaluate", test_x, adv, *rows, "-c", classifier, *defense, "--draws", 3]
        sets = advdiff(*judge, "--predictions", tmp_path / f"{name}.csv", "--json").json["sets"]
        shares[name] = [read.predictions.share for read in read_predictions(tmp_path / f"{name}.csv")]
        assert [s["accuracy"]["value"] for s in sets] == pytest.approx([share.mean() for share in shares[name]])
    both = ["compare", *(tmp_path / f"{name}.csv" for name in defenses)]
    found = advdiff(*both, "--json").json
    assert [(s["place"], s["n"]) for s in found["sets"]] == [(1, 8), (1, 6), (2, 8), (2, 6)]
    assert [c["n"] for c in found["comparisons"]] == [6, 6]
    for place, pair in enumerate(found["comparisons"]):
        apart = shares["ddpm"][place] - shares["noise"][place][:6]
        assert pair["difference"]["value"] == pytest.approx(apart.mean())
    assert f"ddpm: {tmp_path / 'ddpm.h5'} - noise: {tmp_path / 'noise.h5'}" in " ".join(advdiff(*both).out.split())
    assert advdiff(*both, "-q").out.split() == [str(c["difference"]["value"]) for c in found["comparisons"]]


def test_compare_tests_every_pair_of_a_place(advdiff, tmp_path):
    rights = [np.arange(20) < k for k in (18, 12, 5)]
    for k, right in enumerate(rights):
        one = EvaluatedSet("adv", origins(range(20)), np.arange(20), Predictions(np.ones(20, int), right.astype(float)))
        write_predictions(tmp_path / f"{k}.csv", [(one, range(20))])
    found = advdiff("compare", *(tmp_path / f"{k}.csv" for k in range(3)), "--json").json["comparisons"]
    pairs = list(itertools.combinations(rights, 2))
    assert [c["p"] for c in found] == pytest.approx(
        [binomtest(int((a & ~b).sum()), (a ^ b).sum()).pvalue for a, b in pairs]
    )
    assert all(c["p_holm"] >= c["p"] for c in found)
    assert [c["difference"]["value"] for c in found] == pytest.approx([b.mean() - a.mean() for a, b in pairs])


def test_what_cannot_be_compared_is_told(advdiff, tmp_path):
    def predictions(name, *sets, labels=(0, 1), of=0):
        found, index = Predictions(np.array(labels), np.array([0.2, 0.7])), np.arange(2)
        of = [EvaluatedSet(s, origins(index, of), index, found) for s in sets]
        write_predictions(tmp_path / name, [(one, range(2)) for one in of])
        return tmp_path / name

    one = predictions("one.csv", "clean", "adv")
    text = one.read_text()
    (tmp_path / "cut.csv").write_text(text[: text.rindex(",")])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    cases = {
        "needs at least two different files": [],
        "is not a file of predictions": [tmp_path / "other.csv"],
        "is damaged": [tmp_path / "cut.csv"],
        "holds 1 sets": [predictions("few.csv", "clean")],
        "shares no patches": [predictions("elsewhere.csv", "clean", "adv", of=1)],
        "label the same rows differently": [predictions("labels.csv", "clean", "adv", labels=(1, 1))],
        "No such file": [tmp_path / "none.csv"],
    }
    assert "needs at least two different files" in advdiff("compare", one, one, code=1).err
    for why, others in cases.items():
        assert why in advdiff("compare", one, *others, code=1).err


def test_a_set_named_twice_has_no_predictions_of_its_own(advdiff, test_x, classifier, tmp_path):
    told = advdiff("evaluate", test_x, test_x, "-c", classifier, "--predictions", tmp_path / "p.csv", code=1).err
    assert "name each set once" in told
