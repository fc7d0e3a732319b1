"""Synthetic H&E-like tissue: deterministic patches, for tests and training without real data.

Stains are mixed in optical density (Ruifrok & Johnston 2001). Every patch shows stroma, background, small round dark
lymphocytes and oval benign nuclei. Tumor adds larger, paler, irregular nuclei with nucleoli. As in PCam, the label is
1 if tumor reaches the central 32x32 pixels, and 0 if it is in the outer ring only. Stain varies from slide to slide
and the density of nuclei is the same in both classes, so that color alone does not separate them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from advdiff_cli.data.output_spec import OutputSpec, RowRange
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Images, RowFingerprints, Rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.provenance import Provenance, recipe
from advdiff_cli.data.rng import RowKey, stream
from advdiff_cli.data.stain import mix

_BATCH = 32
SIZE = 96  # pixels, about 1 µm each
_MARGIN = 24  # drawn around the patch, so that its border cuts nuclei
_SLIDE = 64  # consecutive patches that share a slide's stain
_REACH = 16  # half the side of the window in which a nucleus is drawn

Field = NDArray[np.float32]


class SyntheticSource:
    """Patches 0 to n - 1 of a seed; each label is 0 or 1 with equal probability."""

    def __init__(self, n: int, seed: int) -> None:
        """Define n patches of `seed`; each is drawn when its row is read."""
        self.path = Path(f"synthetic tissue, seed {seed}")
        self.seed = seed
        self.shape: tuple[int, int] | None = (SIZE, SIZE)
        self.index: Rows = np.arange(n)
        self.keys: Sequence[RowKey] = self.index.tolist()
        self.inputs: Sequence[Path] = []
        self.labels: Rows | None = np.array([stream(seed, "label", i).integers(2) for i in range(n)], np.int64)
        self.provenance: Provenance | None = None
        self.origins: RowFingerprints | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.index)

    def read(self, rows: Rows) -> Images:
        """Draw the patches at `rows`."""
        assert self.labels is not None
        return np.stack([draw_patch(self.seed, int(row), int(self.labels[row])) for row in rows])


def draw_patch(seed: int, index: int, label: int) -> NDArray[np.uint8]:
    """Draw patch `index` of `seed` with `label` 0 or 1: (3, 96, 96) uint8, deterministic."""
    rng = stream(seed, "tissue", index)
    side = SIZE + 2 * _MARGIN
    eosin = _stroma(rng, side)
    hematoxylin = np.clip(0.10 + 0.05 * _noise(rng, side, 5.0), 0, None) * (eosin > 0.05)
    for (cy, cx), mask, stain, displaced in _nuclei(rng, side, label):
        top, left = round(cy) - _REACH, round(cx) - _REACH
        window = np.s_[top : top + 2 * _REACH + 1, left : left + 2 * _REACH + 1]
        hematoxylin[window] = np.maximum(hematoxylin[window], mask * stain)
        eosin[window] *= 1 - displaced * np.minimum(mask, 1)
    stains = np.stack([hematoxylin * (1 + 0.12 * _noise(rng, side, 1.0)), eosin])
    stains = gaussian_filter(stains, (0, 0.6, 0.6))[:, _MARGIN : _MARGIN + SIZE, _MARGIN : _MARGIN + SIZE]
    return _render(stains, stream(seed, "slide", index // _SLIDE), rng)


def _noise(rng: np.random.Generator, side: int, sigma: float | tuple[float, float]) -> Field:
    """Return smooth noise (side, side) of mean 0 and deviation 1."""
    field = gaussian_filter(rng.standard_normal((side, side), np.float32), sigma, mode="wrap")
    scaled: Field = (field - field.mean()) / field.std()
    return scaled


def _stroma(rng: np.random.Generator, side: int) -> Field:
    """Return eosin: wavy fibres, cytoplasm, and clear background at the edge of tissue and in fat."""
    fibres = _noise(rng, side, (rng.uniform(5, 10), rng.uniform(0.8, 1.8)))
    if rng.random() < 0.5:
        fibres = fibres.T
    bend = (np.arange(side)[:, None] + 6 * _noise(rng, side, 12.0)).astype(int) % side
    fibres = fibres[bend, np.arange(side)[None, :]]
    eosin = rng.uniform(0.25, 0.5) + 0.06 * fibres + 0.10 * _noise(rng, side, 8.0) + 0.04 * _noise(rng, side, 1.2)
    clear = _noise(rng, side, 9.0) > rng.choice([1.0, 1.6, 2.4, 4.0])
    return np.where(clear, 0.02, np.clip(eosin, 0.06, None)).astype(np.float32)


Nucleus = tuple[tuple[float, float], Field, float, float]


def _nuclei(rng: np.random.Generator, side: int, label: int) -> Iterator[Nucleus]:
    """Yield each nucleus: its center, its mask, its hematoxylin, and the share of eosin it displaces."""
    tumor = _tumor_spots(rng, side, label)
    count = max(8, int(rng.integers(15, 110)) - len(tumor))
    lymphoid = rng.beta(0.7, 0.7)
    cluster = rng.uniform(_MARGIN, side - _MARGIN, 2)
    for _ in range(count):
        y, x = rng.normal(cluster, 20) if rng.random() < 0.4 else rng.uniform(0, side, 2)
        spot = (_inside(y, side), _inside(x, side))
        if rng.random() < lymphoid:
            yield spot, _oval(rng, rng.uniform(2.7, 3.8), rng.uniform(1.0, 1.2), 0.10), rng.uniform(1.0, 1.6), 0.7
        else:
            yield spot, _oval(rng, rng.uniform(3.2, 5.4), rng.uniform(1.2, 2.2), 0.16), rng.uniform(0.6, 1.1), 0.5
    for center in tumor:
        yield center, _tumor_nucleus(rng), rng.uniform(0.65, 1.15), 0.5


def _tumor_spots(rng: np.random.Generator, side: int, label: int) -> list[tuple[float, float]]:
    """Return centers of tumor nuclei: a nest in the center for label 1; none, or a nest in the ring, for label 0."""
    if label == 0 and rng.random() < 0.6:
        return []
    center = side / 2 + rng.uniform(-16, 16, 2)
    if label == 0:
        angle = rng.uniform(0, 2 * np.pi)
        center = side / 2 + 42 * np.array([np.sin(angle), np.cos(angle)])
    spots = [center, *rng.normal(center, 11, (rng.integers(0, 10), 2))]
    outside = [max(abs(s - side / 2)) > 16 + 8 for s in spots]  # half the center, and a nucleus
    kept = [s for s, out in zip(spots, outside, strict=True) if label == 1 or out]
    return [(_inside(y, side), _inside(x, side)) for y, x in kept]


def _inside(position: float, side: int) -> float:
    """Return the position, moved so that the window of a nucleus fits."""
    return float(np.clip(position, _REACH, side - _REACH - 1))


def _grid() -> tuple[Field, Field]:
    y, x = np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1].astype(np.float32)
    return y, x


def _oval(rng: np.random.Generator, radius: float, stretch: float, mottle: float) -> Field:
    """Return a smooth oval nucleus with slightly mottled chromatin."""
    angle = rng.uniform(0, np.pi)
    y, x = _grid()
    u, v = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    distance = np.hypot(u / np.sqrt(stretch), v * np.sqrt(stretch))
    tone = 1 + mottle * _noise(rng, len(y), 1.2)
    nucleus: Field = (np.clip(radius - distance + 0.5, 0, 1) * tone).astype(np.float32)
    return nucleus


def _tumor_nucleus(rng: np.random.Generator) -> Field:
    """Return a large irregular outline with a dark rim, clumped chromatin and nucleoli."""
    y, x = _grid()
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    radius = np.full_like(distance, rng.uniform(4.2, 7.6))
    for k in (2, 3, 4):
        radius *= 1 + rng.uniform(0, 0.15) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    mask = np.clip(radius - distance + 0.5, 0, 1)
    chromatin = 0.65 + 0.22 * _noise(rng, len(y), 1.2) + 0.35 * np.exp(-((distance - radius + 1) ** 2) / 1.5)
    for _ in range(rng.integers(1, 3)):
        oy, ox = rng.uniform(-2.2, 2.2, 2)
        chromatin += 0.8 * np.exp(-((y - oy) ** 2 + (x - ox) ** 2) / 1.6)
    nucleus: Field = (mask * np.clip(chromatin, 0.3, 1.6)).astype(np.float32)
    return nucleus


def _render(stains: Field, slide: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the 8-bit image (3, H, W) of stains (2, H, W), with the colors of a slide and camera noise."""
    strength = slide.uniform(0.75, 1.35, 2).astype(np.float32)
    cast = slide.normal(0, 0.05, (3, 1, 1)).astype(np.float32)
    residual = np.full_like(stains[:1], max(0.0, float(slide.normal(0.03, 0.03))))
    amounts = np.concatenate([1.25 * strength[0] * stains[:1], strength[1] * stains[1:], residual])
    image = mix(torch.from_numpy(amounts)[None])[0].numpy() * (1 + cast) * 0.97
    image = image + rng.normal(0, 0.012, image.shape).astype(np.float32)
    pixels: NDArray[np.uint8] = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return pixels


def write_synthetic(
    out: Path, n: int, seed: int, *, overwrite: bool = False, advance: Callable[[int], None] = lambda count: None
) -> tuple[PatchWriter, int]:
    """Write n patches of `seed` to a file; return the closed writer and the number of positive patches.

    Args:
        out: A .safetensors or .h5 file.
        n: Number of patches.
        seed: Of the patches.
        overwrite: Whether another result may be replaced.
        advance: Called with the number of patches done.
    """
    patches = PatchSet(SyntheticSource(n, seed))
    output = OutputSpec(out, recipe("synthesize", {"seed": seed, "n": n}), overwrite=overwrite)
    writer = PatchWriter(output, patches, RowRange(0, n, n), dtype="uint8", inputs=[], is_origin=True)
    if not writer.up_to_date:
        with writer:
            advance(int(writer.finished.sum()))
            for batch in writer.batches(_BATCH):
                writer.write(batch, patches.source.read(batch.rows[: batch.count]))
                advance(batch.count)
    return writer, int(patches.require_labels().sum())
