"""advdiff: diffusion purification of histopathology patches, and its honest evaluation."""

__version__ = "0.1.0"
