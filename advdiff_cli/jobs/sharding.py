"""Make an output in one process, or in those of torchrun: each makes a shard, and the main one merges them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from advdiff_cli.data import resume, table_writer
from advdiff_cli.data.distributed import NO_SHARD_UNDER_TORCHRUN, ProcessGroup
from advdiff_cli.data.merge import merge_sets, merge_tables
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.provenance import Provenance, same_recipe
from advdiff_cli.data.recorded_files import check_not_input, record_of
from advdiff_cli.data.table_writer import Line, TableWriter
from advdiff_cli.errors import AdvdiffError

Status = Literal["done", "up to date"]
Shard = tuple[int, int]


class RowOutput(Protocol):
    """An output that is made row by row."""

    @property
    def inputs(self) -> Sequence[Path]:
        """Files that the command reads, and which are never replaced."""

    def make(self, output: OutputSpec, rows: RowRange) -> Status:
        """Make the missing ones of some rows."""

    def recorded(self, out: Path) -> Provenance | None:
        """Return the provenance of the output at `out`, or None if there is none."""

    def merge(self, parts: Sequence[Path], output: OutputSpec) -> None:
        """Merge shards, and remove them."""


@dataclass(frozen=True)
class PatchSetOutput:
    """A patch set.

    Args:
        patches: The rows that it is made from.
        work: Computes and writes the missing rows of a writer, and closes it.
    """

    patches: PatchSet
    work: Callable[[PatchWriter], None]

    @property
    def inputs(self) -> Sequence[Path]:
        """The files of the rows and of their labels."""
        return self.patches.inputs

    def make(self, output: OutputSpec, rows: RowRange) -> Status:
        """Make the missing ones of some rows."""
        writer = PatchWriter(output, self.patches, rows)
        if writer.up_to_date:
            return "up to date"
        self.work(writer)
        return "done"

    def recorded(self, out: Path) -> Provenance | None:
        """Return the provenance of the patch set at `out`, or None if there is none."""
        return resume.recorded(out)

    def merge(self, parts: Sequence[Path], output: OutputSpec) -> None:
        """Merge shards, and remove them."""
        merge_sets(parts, output.path, device=output.device, overwrite=output.overwrite)
        for part in parts:
            part.unlink()


@dataclass(frozen=True)
class TableOutput:
    """A table with a line for each patch.

    Args:
        patches: The rows that it is made from.
        header: The names of the columns.
        work: Computes and writes the missing lines of a writer, and closes it.
    """

    patches: PatchSet
    header: Line
    work: Callable[[TableWriter], None]

    @property
    def inputs(self) -> Sequence[Path]:
        """The files of the rows and of their labels."""
        return self.patches.inputs

    def make(self, output: OutputSpec, rows: RowRange) -> Status:
        """Make the missing ones of some rows."""
        known = self.patches.provenance
        writer = TableWriter(output, self.header, rows, inputs=[known] if known else [], read=self.inputs)
        if writer.up_to_date:
            return "up to date"
        self.work(writer)
        return "done"

    def recorded(self, out: Path) -> Provenance | None:
        """Return the provenance of the table at `out`, or None if there is none."""
        return table_writer.recorded_table(out)

    def merge(self, parts: Sequence[Path], output: OutputSpec) -> None:
        """Merge shards, and remove them."""
        merge_tables(parts, output.path, device=output.device, overwrite=output.overwrite)
        for part in parts:
            part.unlink()
            record_of(part).unlink()


def part_path(out: Path, i: int, count: int) -> Path:
    """Return where shard i of `count` is, beside the output that it belongs to."""
    return out.with_name(f"{out.stem}.{i}of{count}{out.suffix}")


def own_path(whole: Path, shard: Shard | None, *, is_whole: bool) -> Path:
    """Return where the rows of a shard are: in the whole output, if that is there, or beside it."""
    return whole if shard is None or is_whole else part_path(whole, *shard)


def begun_shards(out: Path) -> list[Path]:
    """Return where shards of an output are that were begun beside it, finished or not."""
    shard = re.compile(rf"({re.escape(out.stem)}\.\d+of\d+{re.escape(out.suffix)})(\.part)?")
    names = (shard.fullmatch(file.name) for file in out.parent.glob("*of*"))
    return sorted({out.with_name(found[1]) for found in names if found})


@dataclass(frozen=True)
class ShardedOutput:
    """An output to be made in shards.

    Args:
        output: The file.
        n: Its rows.
        batch_size: Patches computed together; shards hold whole batches.
        kind: Makes, reads and merges it.
    """

    output: OutputSpec
    n: int
    batch_size: int
    kind: RowOutput

    def make(self, shard: Shard | None, group: ProcessGroup) -> Status:
        """Make the rows that are missing: of a shard, or of the whole output by all processes of a group.

        Raises:
            AdvdiffError: As the writer, or a shard is asked for under torchrun.
        """
        check_not_input(self.output.path, self.kind.inputs)
        if group.size == 1:
            return self.kind.make(self.output, shard_rows(self.n, self.batch_size, shard))
        if shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        return self._make_together(group)

    def make_beside(self, shard: Shard | None, group: ProcessGroup) -> Status:
        """Make the rows that are missing, as `make`, where a shard goes to a file beside the whole output.

        The whole output is merged from its shards where they were made before.

        Raises:
            AdvdiffError: As for `make`, or some of the shards are not finished.
        """
        is_made = self._is_made()
        group.wait()  # before another process makes it
        if is_made:
            return "up to date"
        if shard is None:
            [merged] = group.sum([group.is_main and self._merge_shards(group)])
            return "done" if merged else self.make(None, group)
        if group.size > 1:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        return self._make_beside(shard)

    def _is_made(self) -> bool:
        """Return whether the whole output is there.

        Raises:
            AdvdiffError: Another one is there, and may not be replaced.
        """
        out = self.output.path
        if self.output.overwrite or not out.exists():
            return False
        have = self.kind.recorded(out)
        if have is None:
            raise AdvdiffError(f"{out} is damaged, or was not made by advdiff; remove it or give --overwrite")
        return resume.matches_recipe(out, resume.identity(have), {**self.output.recipe, "part": None})

    def _merge_shards(self, group: ProcessGroup) -> bool:
        """Merge the shards beside the output; return False if there are none, or they are those of the group."""
        out, begun = self.output.path, begun_shards(self.output.path)
        count = int(begun[0].stem.rpartition("of")[2]) if begun else 0
        if not begun or (group.size > 1 and count == self._shards_of(group)):
            return False
        parts = [part_path(out, i, count) for i in range(count)]
        missing = [f"{i}/{count}" for i, part in enumerate(parts) if not self._is_shard(part)]
        if len(missing) == count and self.output.overwrite:
            return False  # they are of another recipe, which may be replaced
        if missing:
            raise AdvdiffError(
                f"{out}: --shard {', '.join(missing)} not finished with these settings; finish, or remove "
                f"{out.stem}.*of{count}{out.suffix}*"
            )
        self.kind.merge(parts, self.output)
        return True

    def _is_shard(self, part: Path) -> bool:
        have = self.kind.recorded(part) if part.is_file() else None
        return have is not None and same_recipe(have["recipe"], self.output.recipe)

    def _make_beside(self, shard: Shard) -> Status:
        """Make a shard beside the output; one that is finished is not made again."""
        path = part_path(self.output.path, *shard)
        overwrite = self.output.overwrite and not self._is_shard(path)
        rows = shard_rows(self.n, self.batch_size, shard)
        return self.kind.make(replace(self.output, path=path, overwrite=overwrite), rows)

    def _shards_of(self, group: ProcessGroup) -> int:
        """Return the number of processes of a group that have a batch to make."""
        return min(group.size, -(-self.n // self.batch_size))

    def _make_together(self, group: ProcessGroup) -> Status:
        output, out = self.output, self.output.path
        if self._is_made():
            return "up to date"
        shards = self._shards_of(group)
        if shards == 1:
            if group.is_main:
                self.kind.make(output, shard_rows(self.n, self.batch_size, None))
            group.wait()
            return "done"
        parts = [part_path(out, i, shards) for i in range(shards)]
        if group.rank < shards:
            self._make_beside((group.rank, shards))
        group.wait()
        if group.is_main:
            self.kind.merge(parts, output)
        group.wait()
        return "done"
