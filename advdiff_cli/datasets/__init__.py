"""PatchCamelyon from Zenodo, and synthetic tissue."""
