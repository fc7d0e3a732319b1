"""The row `certified` of a suite: which votes are taken again, and when an attack breaks a proof."""

import numpy as np
import pytest

from advdiff_cli.attacks.spec import AttackRequest, resolve
from advdiff_cli.certification.certificate_file import CertifiedSet
from advdiff_cli.certification.summary import Radius
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.robustness.certified_accuracy import VOTES, BrokenCertificates, CertifiedAccuracy, is_changed
from advdiff_cli.robustness.sanity_checks import of_certificates
from advdiff_cli.robustness.suite import SuiteRow

EPS = 2 / 255


@pytest.fixture
def certified():
    """Four patches of label 1: certified right, certified wrong, certified too little, and an abstention."""
    decision, abstain = np.array([1, 0, 1, 1]), np.array([False, False, False, True])
    labels, index, ones = np.ones(4, np.int64), np.arange(4), np.ones(4)
    radius, rows = np.array([2, 2, 0.1, 0]), np.eye(4, 32, dtype=np.uint8)
    found = CertifiedSet(list("abcd"), index, labels, decision, abstain, radius, labels, ones, rows)
    return CertifiedAccuracy(found, Radius.linf(EPS, 3 * 96 * 96), 0.001, 0.6)


def row(name, eps):
    return SuiteRow(name, "white-box", resolve("pgd", "linf", eps, AttackRequest(), defended=True))


def test_what_is_proved_counts_decisions_that_are_right(certified):
    assert certified.proved.tolist() == [True, True, False, False]
    told = certified.summary()
    assert (told["value"], told["vote_accuracy"]["value"], told["abstained"]) == (0.25, 0.75, 1)


def test_votes_within_the_radius_that_are_not_the_certified_decision_are_taken_again(certified):
    changed = Predictions(np.ones(4, np.int64), np.array([[0.1] * 3, [0.9] * 3, [0.1] * 3, [0.1] * 3]))
    rows = [row("pgd", EPS), row("large", 4 / 255), SuiteRow("clean", "control")]
    judged = {"pgd": changed, "large": changed, "clean": changed}
    assert certified.suspects(rows, judged) == [("pgd", 0), ("pgd", 1)]


def test_a_vote_is_changed_beyond_chance():
    assert not is_changed(VOTES // 2 - 10, 1)
    assert is_changed(VOTES // 2 - 100, 1)
    assert not is_changed(VOTES // 2 - 62, 1000)
    assert is_changed(VOTES // 2 - 62, 1)


def test_alpha_is_of_every_patch_that_was_tried():
    assert BrokenCertificates(256, 3, 1, 1).is_by_chance(0.001)
    assert not BrokenCertificates(4, 3, 1, 1).is_by_chance(0.001)


@pytest.mark.parametrize(("broken", "status"), [(0, "pass"), (1, "warn"), (5, "fail")])
def test_alpha_allows_for_few_broken_certificates(broken, status):
    assert of_certificates(BrokenCertificates(100, 60, 7, broken), 0.001).status == status


def test_without_certificates_there_is_no_check_of_them():
    assert of_certificates(BrokenCertificates(100, 0, 0, 0), 0.001) is None
