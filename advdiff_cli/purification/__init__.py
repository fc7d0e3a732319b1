"""Purifiers and the defended classifier: images in [0, 1] to images in [0, 1], or to logits."""

from advdiff_cli.purification.purifier import DefendedClassifier, DiffusionPurifier, NoisePurifier

__all__ = ["DefendedClassifier", "DiffusionPurifier", "NoisePurifier"]
