"""Purifiers (images in [0, 1] to images in [0, 1]) and the defended classifier (images in [0, 1] to logits)."""
