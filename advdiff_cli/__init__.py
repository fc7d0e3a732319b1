"""advdiff: diffusion purification of histopathology patches, and its honest evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["DefendedClassifier", "DiffusionPurifier", "load_classifier", "load_ddpm", "open_patches", "pgd"]

if TYPE_CHECKING:
    from advdiff_cli.attacks.pgd import pgd
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.models.registry import load_classifier, load_ddpm
    from advdiff_cli.purification.defended_classifier import DefendedClassifier
    from advdiff_cli.purification.purifier import DiffusionPurifier

_MODULES = {
    "DefendedClassifier": "purification.defended_classifier",
    "DiffusionPurifier": "purification.purifier",
    "load_classifier": "models.registry",
    "load_ddpm": "models.registry",
    "open_patches": "data.patches",
    "pgd": "attacks.pgd",
}
"""Where public names are; each is imported when it is first used, since torch takes seconds."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
