"""Figures, intervals and paired tests against published values and other implementations."""

import json

import numpy as np
import pytest
import torch
from rows import origins
from scipy.special import ndtri
from scipy.stats import norm as normal

from advdiff_cli.commands.evaluate import _how_made
from advdiff_cli.data.patches import open_patches
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation import statistics
from advdiff_cli.evaluation.comparison import EvaluatedSet, compare
from advdiff_cli.evaluation.metrics import Predictions, auroc, classification_metrics
from advdiff_cli.evaluation.provenance_checks import Judge, provenance_warnings
from advdiff_cli.evaluation.statistics import (
    bootstrap,
    holm,
    mcnemar,
    mean_share,
    paired_difference,
    shares_difference,
    wilson,
)
from advdiff_cli.jobs.predict import predict
from advdiff_cli.purification.defense_spec import DefenseSpec


def test_wilson_gives_the_papers_intervals():
    one = wilson(870, 1000)
    assert (round(100 * one.low, 1), round(100 * one.high, 1)) == (84.8, 88.9)
    two = wilson(750, 1000)
    assert (round(100 * two.low, 1), round(100 * two.high, 1)) == (72.2, 77.6)
    assert str(one) == "87.0 [84.8, 88.9]"


def test_newcombe_gives_his_published_example():
    """Newcombe 1998 (Statistics in Medicine 17:2635), method 10, his example of 36, 12, 2 and 0 of 50 pairs."""
    first = np.repeat([True, True, False, False], [36, 12, 2, 0])
    second = np.repeat([True, False, True, False], [36, 12, 2, 0])
    found = paired_difference(second, first)
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_shares_of_draws_have_the_intervals_of_what_they_stand_for():
    """Agresti & Coull and Bonett & Price at 0/1 outcomes, beside Wilson and Newcombe."""
    outcomes = np.repeat([1.0, 0.0], [87, 13])
    nearly = outcomes * (1 - 1e-9)
    assert mean_share(outcomes) == wilson(87, 100)
    coull = binomial_wald(87 + 1.959964**2 / 2, 100 + 1.959964**2)
    assert (mean_share(nearly).low, mean_share(nearly).high) == pytest.approx(coull, abs=1e-6)
    assert mean_share(np.full(100, 0.87)).high - 0.87 < (wilson(87, 100).high - 0.87) / 2
    assert mean_share(np.append(np.ones(63), 10 / 11)).low < 0.95  # one draw of one patch is no certainty

    first, second = np.repeat([1.0, 0.0, 1.0], [3, 12, 40]), np.repeat([0.0, 1.0, 1.0], [3, 12, 40])
    assert shares_difference(first, second) == paired_difference(first == 1, second == 1)
    close, exact = shares_difference(first, second * (1 - 1e-9)), paired_difference(first == 1, second == 1)
    assert close.value == pytest.approx(9 / 55)
    p, q, n = 4 / 57, 13 / 57, 57
    half = 1.959964 * ((p + q - (p - q) ** 2) / n) ** 0.5
    assert (close.low, close.high) == pytest.approx((q - p - half, q - p + half), abs=1e-6)
    assert (close.low, close.high) == pytest.approx((exact.low, exact.high), abs=0.03)


def test_intervals_of_shares_cover_what_they_should():
    """Of 400 samples of 100 patches with 11 draws each, at least 92 % of the 95 % intervals hold the truth."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(400):
        p = rng.beta(2, 0.5, 100)
        one, two = (rng.binomial(11, x) / 11 for x in (p, p * 0.95))
        mean, change = mean_share(one), shares_difference(one, two)
        hits += [mean.low <= 0.8 <= mean.high, change.low <= -0.04 <= change.high]
    assert (hits / 400 > 0.92).all()


def binomial_wald(successes, n):
    p = successes / n
    half = 1.959964 * (p * (1 - p) / n) ** 0.5
    return p - half, p + half


def test_identical_outcomes_differ_by_nothing():
    same = np.array([True] * 30 + [False] * 10)
    found = paired_difference(same, same)
    assert found.value == 0
    assert found.low < 0 < found.high
    assert mcnemar(same, same) == 1


def test_mcnemar_is_the_binomial_test_on_discordant_pairs():
    first = np.repeat([True, False, True], [3, 12, 40])
    second = np.repeat([False, True, True], [3, 12, 40])
    assert mcnemar(first, second) == pytest.approx(2 * sum(_choose(15, k) for k in range(4)) / 2**15)


def _choose(n, k):
    return float(np.prod([(n - i) / (i + 1) for i in range(k)]))


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_auroc_is_the_share_of_pairs_in_order():
    """Each positive beside each negative: in order counts one, a tie one half."""
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 8
    pairs = np.sign(scores[labels == 1][:, None] - scores[labels == 0][None, :])
    assert auroc(labels, scores) == pytest.approx(((pairs + 1) / 2).mean())
    assert np.isnan(auroc(np.ones(3, int), np.ones(3)))


def test_figures_of_a_known_table():
    labels = np.repeat([1, 1, 0, 0], [30, 10, 45, 15])
    p1 = np.repeat([0.9, 0.1, 0.1, 0.9], [30, 10, 45, 15])
    found = classification_metrics(Predictions(labels, p1))
    assert {k: round(v.value, 4) for k, v in found.items()} == {
        "accuracy": 0.75,
        "balanced_accuracy": 0.75,
        "sensitivity": 0.75,
        "specificity": 0.75,
        "auroc": 0.75,
    }
    for value in found.values():
        assert value.low < value.value < value.high


def test_intervals_at_the_ends_are_not_points():
    labels = np.repeat([1, 0], 10)
    for p1 in (np.repeat([0.9, 0.1], 10), np.repeat([0.1, 0.9], 10)):
        found = classification_metrics(Predictions(labels, p1))
        assert {v.value for v in found.values()} == {float(p1[0] > 0.5)}
        assert all(0.15 < v.high - v.low < 0.35 for v in found.values()), found
    few = classification_metrics(Predictions(np.repeat([0, 1], [3, 97]), np.repeat([0.1, 0.9, 0.1], [3, 90, 7])))
    assert few["balanced_accuracy"].low < 0.75  # three negatives say little, right as they are


@pytest.mark.parametrize(("apart", "n"), [(0.5, 15), (1.5, 30), (2.5, 60)])
def test_areas_and_balanced_accuracies_are_covered(apart, n):
    """Of 300 samples of two normal distributions, at least 92 % of the 95 % intervals hold the truth."""
    rng = np.random.default_rng(0)
    labels, hits = np.repeat([0, 1], [n, 2 * n]), np.zeros(2)
    for _ in range(300):
        p1 = normal.cdf(rng.normal(0, 1, 3 * n) + apart * (labels - 0.5))
        found = classification_metrics(Predictions(labels, p1))
        truths = {"auroc": normal.cdf(apart / 2**0.5), "balanced_accuracy": normal.cdf(apart / 2)}
        hits += [found[k].low <= truth <= found[k].high for k, truth in truths.items()]
    assert (hits / 300 > 0.92).all(), hits


def test_logits_that_are_not_finite_are_no_decisions(test_x):
    class Overflowing(torch.nn.Module):
        def forward(self, images):
            return torch.where(torch.arange(len(images))[:, None] == 2, torch.inf, images.mean((2, 3))[:, :2])

    with pytest.raises(AdvdiffError, match=r"the logits of row 2 of .* are not finite"):
        predict(Overflowing(), open_patches(test_x).first(4), torch.device("cpu"))


def test_bootstrap_covers_like_wilson_for_a_proportion():
    correct = np.repeat([1.0, 0.0], [80, 20])
    found = bootstrap(lambda rows: float(correct[rows].mean()), np.zeros(100, int))
    expected = wilson(80, 100)
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_only_rows_made_from_the_same_patches_are_paired():
    labels = np.array([0, 1, 1, 0])
    right, wrong = np.array([0.1, 0.9, 0.9, 0.1]), np.array([0.9, 0.1, 0.9, 0.1])
    a = EvaluatedSet("a", origins([5, 6, 7, 8]), np.array([5, 6, 7, 8]), Predictions(labels, right))
    b = EvaluatedSet("b", origins([8, 7, 6, 5]), np.array([8, 7, 6, 5]), Predictions(labels[::-1], wrong[::-1]))
    c = EvaluatedSet("c", origins([5, 6, 7, 8], of=1), np.array([5, 6, 7, 8]), Predictions(labels, right))
    (pair,) = compare([a, b, c])
    assert (pair["first"], pair["second"], pair["n"]) == ("a", "b", 4)
    assert (pair["only_first_right"], pair["only_second_right"]) == (2, 0)
    assert pair["difference"]["value"] == -0.5


def test_evaluate_tells_a_row_a_set(advdiff, patches, classifier, tmp_path):
    folder = patches / "images" / "test"
    csv = tmp_path / "p.csv"
    result = advdiff("evaluate", folder, "--split", "test", "-c", classifier, "--json", code=1)
    assert "holds no PCam files" in result.err
    both = advdiff("evaluate", folder, patches, "--split", "test", "-c", classifier, "--json").json
    assert both["sets"][0]["n"] == both["sets"][1]["n"] == len(open_patches(folder))
    result = advdiff("evaluate", folder, "-c", classifier, "--predictions", csv, "--json").json
    json.dumps(result, allow_nan=False)
    (row,) = result["sets"]
    lines = csv.read_text().splitlines()
    assert lines[0] == "set,origin_sha256,index,row,label,draw,p1"
    assert len(lines) == row["n"] + 1
    right = sum((float(p) > 0.5) == (label == "1") for *_, label, _, p in (line.split(",") for line in lines[1:]))
    assert row["accuracy"]["value"] == pytest.approx(right / row["n"])
    assert advdiff("evaluate", folder, "-c", classifier, "-q").out.strip() == str(row["accuracy"]["value"])


@pytest.mark.cpu  # a batch of a GPU holds all of these patches
def test_shards_of_predictions_merge_and_are_read(advdiff, test_x, classifier, tmp_path, monkeypatch):
    noised = ["evaluate", test_x, "-c", classifier, "--defense", "noise", "--draws", 2, "--limit", 40, "--json"]
    evaluate = [*noised[:2], tmp_path / "adv.h5", *noised[2:]]
    advdiff("attack", test_x, "-c", classifier, "--steps", 1, "--limit", 40, "-o", tmp_path / "adv.h5")
    whole, merged = tmp_path / "whole.csv", tmp_path / "merged.csv"
    alone = advdiff(*evaluate, "--predictions", whole).json
    assert "give --predictions" in advdiff(*evaluate, "--shard", "0/2", code=1).err
    parts = [tmp_path / f"{i}.csv" for i in range(2)]
    shards = [advdiff(*evaluate, "--shard", f"{i}/2", "--predictions", part).json for i, part in enumerate(parts)]
    assert [[s["n"] for s in shard["sets"]] for shard in shards] == [[16, 16], [24, 24]]
    assert "rows 0 to 15 are in no shard" in advdiff("merge", parts[1], "-o", merged, code=1).err
    assert advdiff("merge", *parts[::-1], "-o", merged, "--json").json["patches"] == 80
    assert merged.read_bytes() == whole.read_bytes()
    monkeypatch.setattr("advdiff_cli.jobs.evaluate.predict", None)  # nothing is predicted again
    for table in (whole, merged):
        assert advdiff(*evaluate, "--predictions", table).json == alone
    told = advdiff(*evaluate, "--predictions", merged, "--seed", 1, code=1).err
    assert "was made with other settings (seed" in told
    monkeypatch.undo()
    other = advdiff(*evaluate, "--predictions", merged, "--seed", 1, "--overwrite").json
    assert (other["defense"]["seed"], alone["defense"]["seed"]) == (1, 0)


@pytest.mark.cpu  # a batch of a GPU holds all of these patches
def test_merged_shards_of_other_numbers_are_not_taken_for_the_whole(advdiff, test_x, classifier, tmp_path):
    """The first sets join without a gap and the second ones do not, since they have another length."""
    few, more = tmp_path / "few.h5", tmp_path / "more.h5"
    for n, out in ((32, few), (60, more)):
        advdiff("attack", test_x, "-c", classifier, "--steps", 1, "--limit", n, "-o", out)
    evaluate = ["evaluate", few, more, "-c", classifier, "--defense", "noise", "--draws", 1, "--predictions"]
    for shard in ("0/2", "2/3"):
        advdiff(*evaluate, tmp_path / f"{shard[0]}.csv", "--shard", shard)
    merged = advdiff("merge", tmp_path / "0.csv", tmp_path / "2.csv", "-o", tmp_path / "all.csv", "--json").json
    assert merged["patches"] < 32 + 60
    assert f"the patches of {more} are incomplete" in advdiff(*evaluate, tmp_path / "all.csv", code=1).err


def test_the_point_of_the_normal_distribution():
    assert ndtri(0.975) == statistics._Z


def test_an_attack_recorded_by_hand_may_tell_less_than_one_of_advdiff():
    made = {"command": "attack", "parameters": {"eps": 0.0078}}
    predictions = Predictions(np.array([0, 1]), np.array([[0.1], [0.9]]))
    sets = [
        EvaluatedSet(name, origins(range(2)), np.arange(2), predictions, h)
        for name, h in (("clean", []), ("adv", [made]))
    ]
    assert list(provenance_warnings(sets, Judge("classifier"))) == []
    assert _how_made([made]) == "attack"
    made["parameters"] |= {"method": "pgd", "norm": "linf"}
    assert _how_made([made]).startswith("attack (")
    assert list(provenance_warnings(sets, Judge("classifier"))) == []
    made["parameters"] |= {
        "gradient": "full",
        "eot": 1,
        "defense": "noise",
        "t_star": 0.085,
    }  # but no precision, no seed
    assert list(provenance_warnings(sets, Judge("classifier", DefenseSpec("noise", 0.085)))) == []
    (told,) = provenance_warnings(sets, Judge("classifier", DefenseSpec("noise", 0.1)))
    assert "another model (t_star)" in told
