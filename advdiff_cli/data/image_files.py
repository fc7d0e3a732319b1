"""Read and write single image files without loss."""

import struct
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from advdiff_cli.data.patch_source import MAX_PIXELS
from advdiff_cli.errors import AdvdiffError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
Metadata = dict[str, object]

_DECODE_ERRORS = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for damaged images and metadata."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
"""The decoders that may open a file, chosen by its content: Pillow's others include one that runs Ghostscript."""

_ORIENTATION = 0x0112  # the EXIF tag; from 5 to 8, width and height are exchanged
_BITS_PER_SAMPLE = 258  # the TIFF tag
_MAX_DPI = 1e6


def check_file(file: Path) -> None:
    """Check that `file` is a regular file, since opening a pipe could block for ever.

    Raises:
        AdvdiffError: It is not.
    """
    if not file.is_file():
        problem = "is not a regular file" if file.exists() else "does not exist"
        raise AdvdiffError(f"{file} {'is a broken symbolic link' if file.is_symlink() else problem}")


def image_size(file: Path) -> tuple[int, int] | None:
    """Return (H, W) from an image's header, or None if it cannot be read."""
    try:
        check_file(file)
        with _open_image(file) as image:
            return (image.width, image.height) if _is_turned(image) else (image.height, image.width)
    except (AdvdiffError, *_DECODE_ERRORS):
        return None


def _open_image(file: Path) -> Image.Image:
    return Image.open(file, formats=_FORMATS)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, which is upright, where there is none or it is invalid."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds for damaged EXIF data, and the picture is complete without it
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def _is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF orientation exchanges width and height."""
    return _orientation(image) >= 5


def _has_transparency(image: Image.Image) -> bool:
    """Return whether a pixel is transparent; slide readers save opaque tiles with an alpha channel."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def read_image(file: Path) -> NDArray[np.uint8]:
    """Return an image as (3, H, W) uint8 RGB, with its EXIF rotation applied.

    Raises:
        AdvdiffError: The image cannot be decoded, has more than 8 bits a channel, is transparent, or has several
            pages or more than MAX_PIXELS pixels.
    """
    check_file(file)
    try:
        with _open_image(file) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise AdvdiffError(f"{file} has {pixels / 1e6:.0f} megapixels; cut it into tiles")
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise AdvdiffError(f"{file} has more than 8 bits a channel; convert it to 8-bit RGB")
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise AdvdiffError(f"{file} has {pages} pages; split it into one file each")
            image.load()  # raises for damaged pixels, before metadata is read
            if _has_transparency(image):
                raise AdvdiffError(f"{file} has transparent pixels; flatten it to RGB")
            rgb = (ImageOps.exif_transpose(image) if _orientation(image) > 1 else image).convert("RGB")
    except UnidentifiedImageError:
        raise AdvdiffError(f"{file} is not a PNG, JPEG, TIFF or BMP image that can be read") from None
    except _DECODE_ERRORS as e:
        if isinstance(e, FileNotFoundError | PermissionError):
            raise
        raise AdvdiffError(f"{file} cannot be decoded ({e})") from None
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _is_deep(image: Image.Image) -> bool:
    """Return whether an RGB file has 16 bits a channel, which Pillow would reduce to 8 without a warning."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)) if image.format == "TIFF" else (8,)
    deep_png = image.format == "PNG" and any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ()))
    return deep_png or max(bits) > 8


def image_metadata(file: Path) -> Metadata:
    """Return the metadata that stays valid after purification: resolution (dpi) and, for RGB, the ICC profile."""
    with _open_image(file) as image:
        found: Metadata = {}
        dpi = image.info.get("dpi")
        if dpi and all(isfinite(d) and 0 < d < _MAX_DPI for d in dpi):
            found["dpi"] = dpi[::-1] if _is_turned(image) else dpi
        if image.info.get("icc_profile") and image.mode in ("RGB", "RGBA", "P"):  # others are converted to RGB
            found["icc_profile"] = image.info["icc_profile"]
    return found


def write_image(file: Path, image: NDArray[np.uint8], metadata: Mapping[str, object] | None = None) -> None:
    """Write a (3, H, W) uint8 image without loss, as TIFF, BMP or PNG by its suffix (.tif, .tiff, .bmp, .png).

    Raises:
        AdvdiffError: The metadata, of `image_metadata`, cannot be written.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    form = {".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}.get(file.suffix.lower(), "PNG")
    options = {**({"compression": "tiff_deflate"} if form == "TIFF" else {}), **(metadata or {})}
    try:
        picture.save(file, format=form, **options)
    except (ValueError, RuntimeError, OverflowError, struct.error) as e:  # invalid metadata of the input
        raise AdvdiffError(f"{file} cannot be written ({e})") from None
