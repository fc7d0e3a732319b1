"""Joining patch sets: shards of one recipe, or sets that hold different rows of one origin."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advdiff_cli.data.patch_source import Images, Rows
from advdiff_cli.data.patch_writer import Part, PatchWriter
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import Provenance, canonical, recipe
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

_BATCH = 64
_TOLD = 10  # ranges of missing rows that an error names


class _Joined:
    """Sets one after another, as one source."""

    def __init__(self, sets: Sequence[PatchSet], provenance: Provenance) -> None:
        self.path = sets[0].path
        self.shape = sets[0].shape
        self.index: Rows = np.concatenate([s.index for s in sets])
        self.keys: Sequence[RowKey] = self.index.tolist()
        labelled = [s.labels for s in sets if s.labels is not None]
        self.labels: Rows | None = np.concatenate(labelled) if labelled else None
        self.provenance: Provenance | None = provenance
        self._sets = sets
        self._ends = np.cumsum([len(s) for s in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Rows) -> Images:
        sets = np.searchsorted(self._ends, rows, side="right")
        starts = self._ends - [len(s) for s in self._sets]
        images = [self._sets[k].source.read(np.array([row - starts[k]])) for k, row in zip(sets, rows, strict=True)]
        return np.concatenate(images)


def merge_sets(paths: Sequence[Path], out: Path, *, device: str = "cpu", overwrite: bool) -> PatchWriter:
    """Join the sets at `paths` into `out`, and return the finished writer.

    Shards of one recipe, in any order, give the file that one run would have made, with its recipe. Other sets
    are joined in the order given. One file that holds all rows of its recipe is copied, recipe and all: it is the only
    shard where the rows fit one batch.

    Raises:
        AdvdiffError: sizes or types differ, rows are there twice, or shards of the recipe are missing.
    """
    sets = [open_patches(p) for p in paths]
    for one in sets:
        if (one.shape, one.read_dtype(), one.labels is None) != (
            sets[0].shape,
            sets[0].read_dtype(),
            sets[0].labels is None,
        ):
            raise AdvdiffError(
                f"{one.path} differs from {sets[0].path} in patch size, type or labels; they cannot be joined"
            )
    if any("part" in (s.provenance or {}) for s in sets):
        sets, made, inputs = _shards(sets)
    elif len(sets) == 1 and (known := sets[0].provenance) and "recipe" in known:
        made, inputs = known["recipe"], known.get("inputs", [])
    else:
        made, inputs = (
            recipe("merge", {}, data=[s.recipe_input() for s in sets]),
            [s.provenance for s in sets if s.provenance],
        )
        if len({s.origin() for s in sets}) > 1:
            raise AdvdiffError(
                f"{out}: the sets come from different origins; their row numbers cannot stand in one file"
            )
    source = PatchSet(_Joined(sets, {"origin": sets[0].origin()}))
    if len(np.unique(source.index)) < len(source):
        raise AdvdiffError(f"{out}: the sets share rows; join each row once")
    n = len(source)
    sink = PatchWriter(
        out,
        made,
        source,
        Part(0, n, n),
        shape=source.require_shape(),
        dtype=sets[0].read_dtype(),
        device=device,
        overwrite=overwrite,
        inputs=inputs,
    )
    if not sink.up_to_date:
        with sink:
            for batch in sink.batches(_BATCH):
                sink.write(batch, source.source.read(batch.rows))
    return sink


def _shards(sets: list[PatchSet]) -> tuple[list[PatchSet], Provenance, list[Provenance]]:
    """Return the shards in order, the recipe they share and the provenance of their inputs."""
    records = [s.provenance or {} for s in sets]
    if len({canonical(r.get("recipe")) for r in records}) > 1 or not all("part" in r for r in records):
        raise AdvdiffError("the sets are not shards of one recipe; see advdiff info FILE for how each was made")
    order = sorted(range(len(sets)), key=lambda i: records[i]["part"][0])
    end, missing = 0, []
    for start, stop, _ in (*(records[i]["part"] for i in order), (of := records[0]["part"][2], of, of)):
        if start < end:
            raise AdvdiffError(f"rows {start} to {end - 1} are there twice among the shards")
        missing += [f"{end} to {start - 1}"] if start > end else []
        end = stop
    if missing:
        more = f" and {len(missing) - _TOLD} more ranges" if len(missing) > _TOLD else ""
        raise AdvdiffError(f"rows {', '.join(missing[:_TOLD])}{more} are missing among the shards; make those again")
    return [sets[i] for i in order], records[0]["recipe"], records[0]["inputs"]
