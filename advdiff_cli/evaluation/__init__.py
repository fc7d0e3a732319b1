"""Metrics with intervals, paired comparisons, and pictures."""
