"""Patch sets: readers, writers, resume, merging, provenance and random streams."""
