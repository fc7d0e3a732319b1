"""Merge patch sets: shards of one recipe, or sets that hold different rows of one origin."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advdiff_cli.data.output_spec import OutputSpec, RowRange
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Images, RowFingerprints, Rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import Provenance, canonical_json, recipe
from advdiff_cli.data.recorded_files import check_not_input
from advdiff_cli.data.rng import RowKey
from advdiff_cli.data.table_writer import TableWriter, read_csv, recorded_table
from advdiff_cli.errors import AdvdiffError

_BATCH = 64
_SHOWN = 10  # ranges of missing rows that an error names
_SET, _DRAW = "set", "draw"  # columns of predictions on several sets, with a line for each draw


@dataclass(frozen=True)
class Merged:
    """A merged output: the number of its patches, and whether it was there before."""

    patches: int
    up_to_date: bool


class _Concatenated:
    """Several sets, one after another, as one source."""

    def __init__(self, sets: Sequence[PatchSet]) -> None:
        self.path = sets[0].path
        self.inputs: Sequence[Path] = [file for s in sets for file in s.inputs]
        self.shape = sets[0].shape
        self.index: Rows = np.concatenate([s.index for s in sets])
        self.keys: Sequence[RowKey] = self.index.tolist()
        labeled = [s.labels for s in sets if s.labels is not None]
        self.labels: Rows | None = np.concatenate(labeled) if labeled else None
        self.provenance: Provenance | None = None
        stored = any(s.source.origins is not None for s in sets)
        self.origins: RowFingerprints | None = np.concatenate([s.origins() for s in sets]) if stored else None
        self._sets = sets
        self._ends = np.cumsum([len(s) for s in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Rows) -> Images:
        sets = np.searchsorted(self._ends, rows, side="right")
        starts = self._ends - [len(s) for s in self._sets]
        images = [self._sets[k].source.read(np.array([row - starts[k]])) for k, row in zip(sets, rows, strict=True)]
        return np.concatenate(images)


def merge_sets(paths: Sequence[Path], out: Path, *, device: str = "cpu", overwrite: bool) -> Merged:
    """Merge the sets at `paths` into `out`.

    Shards of one recipe, in any order, give the file that a single run would have made, with its recipe. Other sets
    are concatenated in the given order. A single complete set is copied with its recipe: where all rows fit one batch,
    there is only one shard.

    Raises:
        AdvdiffError: The sets differ in size or type, share rows, or are not all the shards of their recipe.
    """
    sets = [open_patches(p) for p in paths]
    check_not_input(out, [file for s in sets for file in s.inputs])
    _check_alike(sets)
    output = OutputSpec(out, {}, device, overwrite)
    if any("part" in (s.provenance or {}) for s in sets):
        order, made_by, inputs = _order_shards([s.provenance or {} for s in sets])
        sets = [sets[i] for i in order]
    elif len(sets) == 1 and (known := sets[0].provenance) and "recipe" in known:
        made_by, inputs = known["recipe"], known.get("inputs", [])
    else:
        made_by = recipe("merge", {}, data=[s.recipe_input() for s in sets])
        inputs = [s.provenance for s in sets if s.provenance]
    merged = PatchSet(_Concatenated(sets))
    n = len(merged)
    if len(np.unique(merged.index)) < n:
        raise AdvdiffError(f"{out}: the sets share row numbers; merge each row once, and only rows of one original set")
    rows, dtype = RowRange(0, n, n), sets[0].read_dtype()
    made, is_origin = replace(output, recipe=made_by), merged.source.origins is None
    writer = PatchWriter(made, merged, rows, dtype=dtype, inputs=inputs, is_origin=is_origin)
    if not writer.up_to_date:
        with writer:
            for batch in writer.batches(_BATCH):
                writer.write(batch, merged.source.read(batch.rows))
    return Merged(n, writer.up_to_date)


def _check_alike(sets: Sequence[PatchSet]) -> None:
    kinds = [(s.shape, s.read_dtype(), s.labels is None) for s in sets]
    for one, kind in zip(sets, kinds, strict=True):
        if kind != kinds[0]:
            raise AdvdiffError(
                f"{one.path} differs from {sets[0].path} in patch size, type or labels; they cannot be merged"
            )


def merge_tables(paths: Sequence[Path], out: Path, *, device: str = "cpu", overwrite: bool) -> Merged:
    """Merge the tables at `paths`, the shards of one recipe in any order, into `out`.

    A single complete table is copied with its recipe. Lines of one set, where the first column names it, stay together.

    Raises:
        AdvdiffError: A file was changed since it was written, or they are not all the shards of one recipe.
    """
    records = []
    for path in paths:
        if not path.is_file():
            raise AdvdiffError(f"no such file: {path}")
        if (known := recorded_table(path)) is None:
            raise AdvdiffError(
                f"{path} is not a table of advdiff predict, certify or evaluate, or was changed since; make it again"
            )
        records.append(known)
    if len(paths) == 1 and "part" not in records[0]:
        order, made_by, inputs = [0], records[0]["recipe"], records[0].get("inputs", [])
    else:
        order, made_by, inputs = _order_shards(records)
    read = [read_csv(paths[i]) for i in order]
    lines, header = [line for _, some in read for line in some], read[0][0]
    if header[0] == _SET:
        names = list(dict.fromkeys(line[0] for line in lines))
        lines.sort(key=lambda line: names.index(line[0]))
    output, rows = OutputSpec(out, made_by, device, overwrite), RowRange(0, len(lines), len(lines))
    writer = TableWriter(output, header, rows, inputs=inputs, read=paths)
    if not writer.up_to_date:
        with writer:
            for batch in writer.batches(_BATCH):
                writer.write(batch, lines[batch.start : batch.start + batch.count])
    per_draw = header.index(_DRAW) if _DRAW in header else None
    n = len(lines) if per_draw is None else sum(line[per_draw] == "0" for line in lines)
    return Merged(n, writer.up_to_date)


def _order_shards(records: Sequence[Provenance]) -> tuple[list[int], Provenance, list[Provenance]]:
    """Return the order of shards, given their provenance, their recipe and the provenance of their inputs."""
    if len({canonical_json(r.get("recipe")) for r in records}) > 1 or not all("part" in r for r in records):
        raise AdvdiffError("these are not the shards of one recipe; see advdiff info FILE for how each was made")
    order = sorted(range(len(records)), key=lambda i: records[i]["part"][0])
    total = records[0]["part"][2]
    end, missing = 0, []
    for start, stop, _ in (*(records[i]["part"] for i in order), (total, total, total)):
        if start < end:
            raise AdvdiffError(f"rows {start} to {end - 1} are in more than one shard")
        missing += [f"{end} to {start - 1}"] if start > end else []
        end = stop
    if missing:
        more = f" and {len(missing) - _SHOWN} more ranges" if len(missing) > _SHOWN else ""
        raise AdvdiffError(f"rows {', '.join(missing[:_SHOWN])}{more} are in no shard; make the missing shards")
    return order, records[0]["recipe"], records[0]["inputs"]
