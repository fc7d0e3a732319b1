"""The example patches: 64 real patches of PCam's test split, in folders 0 and 1 (CC0)."""

from pathlib import Path

EXAMPLE_PATCHES = Path(__file__).resolve().parent / "example_patches"
