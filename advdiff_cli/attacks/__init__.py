"""Attacks: pure functions from (model, images, labels) to adversarial images, in the ball and in [0, 1]."""

from advdiff_cli.attacks.pgd import pgd

__all__ = ["pgd"]
