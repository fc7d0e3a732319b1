"""Pictures for people: what attack and purification do to a patch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from torch import Tensor

mpl.use("Agg")  # files only: no display is asked for
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Column:
    """One image of each patch: (B, 3, H, W) in [0, 1], with the probability of its true class where it is judged."""

    title: str
    images: Tensor
    confidence: Sequence[float] | None = None


def amplified(images: Tensor, reference: Tensor, eps: float) -> Tensor:
    """Return the difference (B, 3, H, W), grey for none, at full contrast for eps in [0, 1] pixels."""
    return ((images - reference) / (2 * eps) + 0.5).clamp(0, 1)


def panel(columns: Sequence[Column], row_names: Sequence[str], path: Path) -> None:
    """Draw patches as rows and their stages as columns; the classifier's belief in the true class stands below each.

    A belief under one half, a wrong answer, is set in red.
    """
    rows, side = len(row_names), 1.45
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(side * len(columns) + 0.6, (side + 0.28) * rows + 0.5), squeeze=False, dpi=150
    )
    for j, column in enumerate(columns):
        axes[0, j].set_title(column.title, fontsize=8)
        for i in range(rows):
            axis = axes[i, j]
            axis.imshow(np.asarray(column.images[i].permute(1, 2, 0)), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if column.confidence is not None:
                belief = column.confidence[i]
                colour = "#b2182b" if belief < 0.5 else "#1b6e3c"
                axis.set_xlabel(f"p(true) {belief:.2f}", fontsize=7, color=colour, labelpad=2)
    for i, name in enumerate(row_names):
        axes[i, 0].set_ylabel(name, fontsize=7)
    figure.tight_layout(pad=0.4, h_pad=0.6, w_pad=0.3)
    fresh = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(fresh)
    plt.close(figure)
    fresh.replace(path)
