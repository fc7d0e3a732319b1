"""The report: its page, the gallery of patches and the plots."""
