"""Make a patch set in one process, or in those of torchrun: each makes a shard, and the main one merges them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from advdiff_cli.data.distributed import ProcessGroup
from advdiff_cli.data.merge import merge_sets
from advdiff_cli.data.output_spec import OutputSpec, shard_rows
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.resume import is_complete, matches_recipe, recorded
from advdiff_cli.errors import AdvdiffError

Status = Literal["done", "up to date"]
Shard = tuple[int, int]

NO_SHARD_UNDER_TORCHRUN = "--shard: under torchrun the shard is the process's rank; leave the option out"


@dataclass(frozen=True)
class ShardedOutput:
    """A patch set to be made in shards.

    Args:
        output: The .safetensors or .h5 file.
        patches: The rows that it is made from.
        batch_size: Patches computed together; shards hold whole batches.
        work: Computes and writes the missing rows of a writer, and closes it.
    """

    output: OutputSpec
    patches: PatchSet
    batch_size: int
    work: Callable[[PatchWriter], None]

    def make(self, shard: Shard | None, group: ProcessGroup) -> Status:
        """Make the rows that are missing: of a shard, or of the whole set by all processes of a group.

        Raises:
            AdvdiffError: As PatchWriter, or a shard is asked for under torchrun.
        """
        if group.size == 1:
            return self._make_part(self.output.path, shard)
        if shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        return self._make_together(group)

    def _make_part(self, path: Path, shard: Shard | None) -> Status:
        rows = shard_rows(len(self.patches), self.batch_size, shard)
        writer = PatchWriter(replace(self.output, path=path), self.patches, rows)
        if writer.up_to_date:
            return "up to date"
        self.work(writer)
        return "done"

    def _make_together(self, group: ProcessGroup) -> Status:
        output, out = self.output, self.output.path
        if not output.overwrite and is_complete(out, output.recipe):
            return "up to date"
        if out.exists() and not output.overwrite:
            have = recorded(out) or {}
            whole = {**output.recipe, "part": None}
            matches_recipe(out, {**have.get("recipe", {}), "part": have.get("part")}, whole)
        batches = -(-len(self.patches) // self.batch_size)
        shards = min(group.size, batches)
        if shards == 1:
            if group.is_main:
                self._make_part(out, None)
            group.wait()
            return "done"
        parts = [out.with_name(f"{out.stem}.{i}of{shards}{out.suffix}") for i in range(shards)]
        if group.rank < shards:
            self._make_part(parts[group.rank], (group.rank, shards))
        group.wait()
        if group.is_main:
            merge_sets(parts, out, device=output.device, overwrite=output.overwrite)
            for part in parts:
                part.unlink()
        group.wait()
        return "done"
