"""Train classifiers and diffusion models, with checkpoints that resume to the same weights."""
