"""What a classifier reads of a patch: all of it, a center crop, and pixels averaged in squares.

PCam's label is defined by the central 32 x 32 pixels alone. What is not read is neither noised, purified nor attacked.
Neither a crop nor an average enlarges an l-inf perturbation; averaging over k x k pixels shrinks an l2 one k times.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advdiff_cli.data.patch_source import MIN_SIZE
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:  # imported where it is used, so that commands that only read recipes answer at once
    from torch import Tensor

_LARGEST_POOL = 32


@dataclass(frozen=True)
class View:
    """What is read of a patch.

    Args:
        crop: Side of the center crop in pixels; None for the whole patch.
        pool: Side of the squares of pixels that are averaged, after the crop.
    """

    crop: int | None = None
    pool: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for invalid values, since a view may come from anywhere."""
        whole = type(self.pool) is int and (self.crop is None or type(self.crop) is int)
        if not whole or not 1 <= self.pool <= _LARGEST_POOL or (self.crop is not None and self.crop < 1):
            raise ValueError(f"invalid crop or pool: {self.crop}, {self.pool}")
        if self.crop is not None and self.crop % self.pool:
            raise ValueError(f"a crop of {self.crop} pixels cannot be averaged in squares of {self.pool}")

    @property
    def is_whole(self) -> bool:
        """Whether patches are read as they are."""
        return self == WHOLE

    def parameters(self) -> dict[str, int | None]:
        """Return the parameters that enter a recipe; empty for the whole patch."""
        return {} if self.is_whole else {"crop": self.crop, "pool": self.pool}

    def cropped(self, height: int, width: int) -> tuple[int, int]:
        """Return the (H, W) that is read of a patch.

        Raises:
            AdvdiffError: The patch is too small, or cannot be averaged.
        """
        if self.crop is not None and min(height, width) < self.crop:
            raise AdvdiffError(f"patches of {height}x{width} are smaller than the center crop of {self.crop}")
        read = (height, width) if self.crop is None else (self.crop, self.crop)
        if any(side % self.pool or side // self.pool < MIN_SIZE for side in read):
            raise AdvdiffError(
                f"{read[0]}x{read[1]} pixels cannot be averaged in squares of {self.pool}: sides must be multiples of "
                f"it, and at least {MIN_SIZE * self.pool}"
            )
        return read

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (H, W) of what `apply` returns; errors as `cropped`."""
        read = self.cropped(height, width)
        return read[0] // self.pool, read[1] // self.pool

    def apply(self, images: "Tensor") -> "Tensor":
        """Return what is read of images (B, 3, H, W)."""
        if self.is_whole:
            return images
        from torch.nn.functional import avg_pool2d

        height, width = self.cropped(*images.shape[-2:])
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        cropped = images[..., top : top + height, left : left + width]
        return cropped if self.pool == 1 else avg_pool2d(cropped, self.pool)

    def covers(self, other: "View") -> bool:
        """Return whether a model trained under this view knows what `other` reads: the same scale, and no less."""
        return self.pool == other.pool and (self.crop is None or (other.crop is not None and other.crop <= self.crop))

    def describe(self) -> str:
        """Describe the view in a few words."""
        crop = "the whole patch" if self.crop is None else f"the central {self.crop}x{self.crop} pixels"
        return crop if self.pool == 1 else f"{crop}, averaged in squares of {self.pool}"


WHOLE = View()
"""The whole patch."""
