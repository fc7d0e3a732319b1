"""Purifiers and the defended classifier: images in [0, 1] to images in [0, 1], or to logits."""

from advdiff_cli.purification.defended_classifier import DefendedClassifier, FixedNoise, StraightThrough
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier

__all__ = ["DefendedClassifier", "DiffusionPurifier", "FixedNoise", "NoisePurifier", "StraightThrough"]
