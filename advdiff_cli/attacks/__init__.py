"""Attacks: pure functions from (model, images, labels) to adversarial images, in the ball and in [0, 1]."""
