"""Classifiers and diffusion models: build, load, save, and find by name."""
