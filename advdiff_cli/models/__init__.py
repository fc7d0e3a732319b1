"""Classifiers and diffusion models: building, loading, saving, and the names they are known by."""
