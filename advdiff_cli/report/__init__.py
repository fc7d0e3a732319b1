"""The HTML report: page, gallery of patches, and plots."""
