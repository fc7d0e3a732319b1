"""Predictions, metrics with intervals, paired comparisons, fidelity, and checks of how a set was made."""
