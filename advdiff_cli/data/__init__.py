"""Patch sets: one reader and one writer over four forms, recipes, streams, PCam and synthetic tissue."""
