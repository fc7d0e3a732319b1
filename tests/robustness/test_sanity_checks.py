"""Sanity checks: silent about a sound evaluation, loud about planted weaknesses; and the attack's own unit test."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from advdiff_cli.attacks.eot import ObjectiveSpec
from advdiff_cli.attacks.pgd import pgd
from advdiff_cli.data.patches import open_patches
from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions, classification_metrics, vote_accuracies
from advdiff_cli.evaluation.statistics import wilson
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import EvaluatedModel
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar
from advdiff_cli.robustness.binarization import BinarizationResult, binarization_test
from advdiff_cli.robustness.gradient_checks import check_gradients
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.sanity_checks import not_above, sanity_checks
from advdiff_cli.robustness.suite import PRESETS, Budget, SuiteRow, build_suite
from advdiff_cli.robustness.suite_checks import SuiteChecks
from advdiff_cli.robustness.summary import summarize
from advdiff_cli.robustness.worst_case import worst_case

EPS = 2 / 255
CPU = torch.device("cpu")
MARGIN = ObjectiveSpec("margin")


class Net(nn.Module):
    """A small classifier with something planted before or after it."""

    def __init__(self, before=None, after=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(
                nn.Conv2d(3, 16, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(576, 2)
            )
        self.before, self.after = before, after
        self.eval().requires_grad_(False)

    def forward(self, x):
        logits = self.body(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


@pytest.fixture
def few(test_x):
    return open_patches(test_x).first(12)


def drawn(share, n=200, draws=4, seed=0):
    """Predictions right with probability `share`, of labels 0 and 1 in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    right = rng.random((n, draws)) < share
    return Predictions(labels, np.where(right, labels[:, None], 1 - labels[:, None]).astype(float))


def test_a_few_patches_alone_never_fail_an_alarm():
    """Four of 100 changed in one direction: McNemar's p is 0.125; over many draws it is no more certain."""
    for draws in (1, 21):
        p1 = np.ones((100, draws))
        p1[:4] = 0
        worse, better = Predictions(np.ones(100, int), p1), Predictions(np.ones(100, int), np.ones((100, draws)))
        assert not_above("x", "a", "b", {"a": better, "b": worse}).status == "warn"


def test_votes_and_means_of_a_known_table():
    p1 = np.array([[0.9, 0.9, 0.1, 0.9, 0.1], [0.9, 0.1, 0.1, 0.1, 0.1], [0.1] * 5])
    p = Predictions(np.array([1, 1, 0]), p1)
    assert p.share.tolist() == [0.6, 0.2, 1.0]
    found = vote_accuracies(p)
    assert {k: round(v.value, 6) for k, v in found.items()} == {
        "vote_1": 1.0,
        "vote_5": round(2 / 3, 6),
        "all_correct": round(1 / 3, 6),
    }
    assert classification_metrics(p)["accuracy"].value == pytest.approx(0.6)
    assert classification_metrics(p)["sensitivity"].value == pytest.approx(0.4)
    assert classification_metrics(Predictions(p.labels, p1[:, 0]))["accuracy"] == wilson(3, 3)


def test_one_draw_and_none_are_the_same_classification_metrics():
    one = drawn(0.8, draws=1)
    assert classification_metrics(one) == classification_metrics(Predictions(one.labels, one.p1[:, 0]))


@pytest.mark.parametrize(("stronger", "weaker", "status"), [(0.5, 0.8, "pass"), (0.8, 0.5, "fail")])
def test_an_alarm_follows_the_paired_difference(stronger, weaker, status):
    alarm = not_above("x", "a", "b", {"a": drawn(stronger), "b": drawn(weaker, seed=1)})
    assert alarm.status == status
    assert not_above("x", "a", "missing", {"a": drawn(0.5)}) is None


def test_a_wrong_point_estimate_alone_is_a_warning():
    labels = np.arange(100) % 2
    one = np.where(np.arange(100) < 50, labels, 1 - labels).astype(float)
    other = one.copy()
    other[[50]] = labels[[50]]
    assert not_above("x", "a", "b", {"a": Predictions(labels, other), "b": Predictions(labels, one)}).status == "warn"


def test_as_many_correct_draws_in_another_order_are_equal():
    """Sums of elevenths depend on their order; equal accuracy is a pass, and a warning where it should differ."""
    counts = np.random.default_rng(3).integers(0, 12, 64)
    p1 = (np.arange(11) < counts[:, None]).astype(float)
    one, other = (Predictions(np.ones(64, int), p) for p in (p1, p1[counts.argsort()]))
    assert difference_of_means(one, other).value != 0
    for judged in ({"a": one, "b": other}, {"a": other, "b": one}):
        assert not_above("x", "a", "b", judged).status == "pass"
        assert not_above("x", "a", "b", judged, equal=False).status == "warn"


SOUND = {
    "clean": 0.9,
    "random": 0.89,
    "blind": 0.8,
    "transfer": 0.85,
    "bpda": 0.7,
    "square": 0.8,
    "fgsm": 0.75,
    "pgd-short": 0.65,
    "pgd": 0.6,
    "apgd-ce": 0.58,
    "apgd-margin": 0.57,
    "pgd-one-draw": 0.72,
    "fixed-noise": 0.4,
    "eps-0.5": 0.85,
    "eps-1": 0.78,
    "eps-4": 0.3,
    "eps-8": 0.1,
    "eps-64": 0.0,
}


def sound():
    """Predictions of nested outcomes: a patch wrong under a weaker attack is wrong under a stronger one."""
    rng = np.random.default_rng(0)
    hard = rng.random((300, 3))
    labels = np.arange(300) % 2
    return {
        name: Predictions(labels, np.where(hard < share, labels[:, None], 1 - labels[:, None]).astype(float))
        for name, share in SOUND.items()
    }


def test_a_sound_evaluation_sounds_no_alarm():
    rows = build_suite(PRESETS["quick"], EPS, defended=True)
    assert {r.name for r in rows} == set(SOUND)
    tested = BinarizationResult(60, wilson(60, 60), wilson(0, 60))
    assert {a.status for a in sanity_checks(rows, sound(), None, tested)} == {"pass"}


@pytest.mark.parametrize(
    ("planted", "alarm"),
    [
        ({"pgd": 0.8}, "iterative beats single-step"),
        ({"pgd": 0.7}, "more steps do not help the defense"),
        ({"pgd-short": 0.8}, "more draws do not help the defense"),
        ({"square": 0.4}, "white-box beats black-box"),
        ({"transfer": 0.4}, "white-box beats black-box"),
        ({"eps-4": 0.7}, "a larger eps is worse"),
        ({"eps-64": 0.8}, "a huge eps breaks anything"),
        ({"fixed-noise": 0.8}, "knowing the noise helps the attack"),
        ({"bpda": 0.2}, "no attack beats exact gradients"),
    ],
)
def test_a_planted_weakness_sounds_its_alarm(planted, alarm):
    judged = sound()
    labels = judged["clean"].labels
    hard = np.random.default_rng(0).random((300, 3))
    for name, share in planted.items():
        judged[name] = Predictions(labels, np.where(hard < share, labels[:, None], 1 - labels[:, None]).astype(float))
    failed = {
        a.name
        for a in sanity_checks(build_suite(PRESETS["quick"], EPS, defended=True), judged, None, None)
        if a.status == "fail"
    }
    assert alarm in failed


def round_to_8_bits(x):
    return (x * 255).round() / 255


def test_planted_gradient_masking_is_seen(few):
    seen = check_gradients(Net(before=round_to_8_bits), few, MARGIN, 32, CPU)
    assert seen.zero.value == 1
    seen = check_gradients(Net(after=lambda z: (z * 1e4).softmax(1)), few, MARGIN, 32, CPU)
    assert seen.probabilities
    assert seen.zero.value > 0.5
    failed = {a.name for a in sanity_checks([], {}, seen, None) if a.status == "fail"}
    assert failed == {"gradients are not zero", "outputs are logits"}


class Unrooted(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_gradients_that_are_not_numbers_are_seen(few):
    net = Net(before=Unrooted.apply)
    for model in (net, DefendedClassifier(NoisePurifier(linear_alpha_bar(), 0.01), net)):
        seen = check_gradients(model, few, MARGIN, 5, CPU)
        assert seen.zero.value == 1
        json.dumps(seen.as_dict(), allow_nan=False)
        assert "gradients are not zero" in {a.name for a in sanity_checks([], {}, seen, None) if a.status == "fail"}
    images = few.read(range(2))
    for norm in ("linf", "l2"):
        assert pgd(net, images, torch.zeros(2).long(), eps=0.1, steps=2, norm=norm, random_start=False).isfinite().all()


BUDGET = Budget(patches=40, steps=12, eot=1, queries=15, draws=1)


def run_suite(model, test_x, folder):
    """The sanity checks of a whole suite on a model, by status."""
    folder.mkdir()
    rows, judged = build_suite(BUDGET, EPS, defended=False), {}
    evaluated, patches = EvaluatedModel(model, "planted"), open_patches(test_x)
    runner = SuiteRunner(evaluated, patches, BUDGET, folder, 0, 40, CPU, suite=rows)
    for row in rows:
        runner.attack(row, lambda count: None)
        judged[row.name] = runner.judge(row, lambda count: None)
    attack = next(r.attack for r in rows if r.name == "pgd")
    checks = SuiteChecks(runner)
    gradients, tested = checks.gradients(lambda count: None), checks.binarization_test(attack, lambda count: None)
    found = summarize(rows, judged, EPS, gradients, tested)
    assert len(found["alarms"]) > 12
    return {
        status: {a["name"] for a in found["alarms"] if a["status"] == status} for status in ("pass", "warn", "fail")
    }


def test_an_undefended_model_trips_no_alarm(test_x, tmp_path):
    found = run_suite(Net(), test_x, tmp_path / "suite")
    assert not found["warn"] | found["fail"]


def test_rounding_inside_the_model_trips_alarms(test_x, tmp_path):
    found = run_suite(Net(before=round_to_8_bits), test_x, tmp_path / "suite")
    assert {"gradients are not zero", "the attack passes its unit test"} <= found["fail"]


def test_a_saturating_softmax_trips_alarms(test_x, tmp_path):
    found = run_suite(Net(after=lambda z: (z * 1e4).softmax(1)), test_x, tmp_path / "suite")
    assert {"gradients are not zero", "outputs are logits"} <= found["fail"]


def test_an_undefended_model_is_seen_to_be_sound(few):
    seen = check_gradients(Net(), few, MARGIN, 32, CPU)
    assert {a.status for a in sanity_checks([], {}, seen, None)} == {"pass"}
    assert seen.cosine is None


def test_halves_of_a_gradient_agree_where_noise_is_small(few):
    net = Net()
    little, much = (
        check_gradients(DefendedClassifier(NoisePurifier(linear_alpha_bar(), t), net), few, MARGIN, 32, CPU)
        for t in (0.001, 0.9)
    )
    assert little.cosine.value > 0.9
    assert much.cosine.value < little.cosine.value


def binarised(model, classifier, few, attack):
    images = few.read(range(4))
    return binarization_test(model, classifier, images, few.keys[:4], 8 / 255, 0, attack)


def test_the_unit_test_tells_an_attack_from_none(few, ddpm):
    from advdiff_cli.models.ddpm import read_ddpm

    net = Net()
    defended = DefendedClassifier(DiffusionPurifier(read_ddpm(ddpm).requires_grad_(False), 0.02, "ddpm", 2), net)
    for model in (net, defended.eval()):
        tested = binarised(model, net, few, lambda m, x, y: pgd(m, x, y, eps=8 / 255, steps=20, loss="margin"))
        assert tested.exists.float().mean() >= 0.75
        assert tested.broken[tested.exists].float().mean() >= 0.9
        idle = binarised(model, net, few, lambda m, x, y: x)
        assert torch.equal(idle.exists, tested.exists)
        assert not idle.broken[idle.exists].any()


def test_masked_gradients_fail_the_unit_test(few):
    net = Net(before=round_to_8_bits)
    tested = binarised(
        net, net, few, lambda m, x, y: pgd(m, x, y, eps=8 / 255, steps=10, loss="margin", random_start=False)
    )
    assert tested.exists.any()
    assert not tested.broken[tested.exists].any()


def test_a_model_without_a_linear_head_has_no_unit_test(few):
    net = Net()
    net.body[-1] = nn.Identity()
    assert binarised(net, net, few, lambda m, x, y: x) is None


class Crowded(Net):
    """A linear layer that nothing calls after the head, and one that sees tokens before it."""

    def __init__(self, pooled):
        super().__init__()
        self.tokens, self.unused, self.pooled = nn.Linear(576, 2), nn.Linear(9, 2), pooled

    def forward(self, x):
        if self.pooled:
            return self.tokens(self.body[:-1](x)[:, None].expand(-1, 3, -1)).mean(1)
        return super().forward(x)


def test_the_head_is_the_last_linear_layer_that_is_called(few):
    plain, crowded = Net(), Crowded(pooled=False)
    found = [binarised(net, net, few, lambda m, x, y: x) for net in (plain, crowded)]
    assert torch.equal(found[0].exists, found[1].exists)
    pooled = Crowded(pooled=True)
    assert binarised(pooled, pooled, few, lambda m, x, y: x) is None


def test_the_worst_case_never_rises():
    judged = sound()
    rows = build_suite(PRESETS["quick"], EPS, defended=True)
    few: list[SuiteRow] = [r for r in rows if r.name in ("clean", "blind")]
    accuracies = [worst_case(few, judged, EPS)[1].share.mean()]
    for r in rows:
        if r not in few:
            few.append(r)
            accuracies.append(worst_case(few, judged, EPS)[1].share.mean())
    assert accuracies == sorted(accuracies, reverse=True)
    names, _ = worst_case(rows, judged, EPS)
    assert "eps-1" in names
    assert "eps-4" not in names
    assert "fixed-noise" not in names
    assert worst_case(rows, judged, 4 / 255)[1].share.mean() <= worst_case(rows, judged, EPS)[1].share.mean()
