"""Purifiers (images in [0, 1] to images in [0, 1]) and the defended classifier (images in [0, 1] to logits)."""

from advdiff_cli.purification.defended_classifier import DefendedClassifier, FixedNoiseClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier

__all__ = ["DefendedClassifier", "DiffusionPurifier", "FixedNoiseClassifier", "NoisePurifier"]
