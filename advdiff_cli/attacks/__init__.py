"""Attacks: pure functions from (model, images, labels) to adversarial images, in the ball and in [0, 1]."""

from advdiff_cli.attacks.apgd import apgd
from advdiff_cli.attacks.bpda import BpdaClassifier
from advdiff_cli.attacks.pgd import pgd
from advdiff_cli.attacks.square import square

__all__ = ["BpdaClassifier", "apgd", "pgd", "square"]
