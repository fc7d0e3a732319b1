"""The HTML report: page, gallery of patches, and plots."""

GALLERY_PATCHES = 12
"""Patches in a gallery, where no number is given."""
