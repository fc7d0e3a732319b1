"""The rows of a file, made by one process, or by those of torchrun: each makes a shard, and the first joins them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advdiff_cli import console
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.distributed import Processes
    from advdiff_cli.data.patch_writer import PatchWriter
    from advdiff_cli.data.patches import PatchSet


def fill(
    out: Path, made_by: dict[str, Any], patches: "PatchSet", shard: tuple[int, int] | None, processes: "Processes",
    work: "Callable[[PatchWriter], None]", *, device: str, overwrite: bool,
) -> str:  # fmt: skip
    """Let `work` write the rows of `out` that are not finished; return `done`, or `up to date` where none was left.

    Args:
        out: A .safetensors or .h5 file to be made.
        made_by: Its recipe, which names the batch size.
        patches: The rows it is made from.
        shard: Which part of them, of a scheduler's; that of torchrun's processes is their rank.
        processes: The processes that share the work.
        work: Computes and writes the rows of a writer, and closes it.
        device: Kind of device, for the record.
        overwrite: Whether another result may be replaced.

    Raises:
        AdvdiffError: as PatchWriter, or a shard is asked for of processes that are shards already.
    """
    from advdiff_cli.data import patch_writer

    def one(target: Path, part: tuple[int, int] | None) -> str:
        rows = patch_writer.shard_rows(len(patches), made_by["parameters"]["batch_size"], part)
        sink = patch_writer.PatchWriter(
            target, made_by, patches, rows, shape=patches.require_shape(), device=device, overwrite=overwrite
        )
        if not sink.up_to_date:
            work(sink)
        return "up to date" if sink.up_to_date else "done"

    if processes.count == 1:
        status = one(out, shard)
    else:
        if shard is not None:
            raise AdvdiffError("--shard: under torchrun each process takes the shard of its rank; leave it out")
        status = _in_shards(out, made_by, patches, processes, one, device, overwrite)
    if status == "up to date":
        console.log(f"{out} is up to date")
    return status


def _in_shards(
    out: Path, made_by: dict[str, Any], patches: "PatchSet", processes: "Processes",
    one: Callable[[Path, tuple[int, int] | None], str], device: str, overwrite: bool,
) -> str:  # fmt: skip
    from advdiff_cli.data.merge import merge_sets
    from advdiff_cli.data.patch_writer import is_made

    if not overwrite and is_made(out, made_by):
        return "up to date"
    if out.exists() and not overwrite:
        raise AdvdiffError(f"{out} exists and was made otherwise; give --overwrite or another --out")
    batches = -(-len(patches) // made_by["parameters"]["batch_size"])
    shards = min(processes.count, batches)
    if shards == 1:
        if processes.first:
            one(out, None)
        processes.wait()
        return "done"
    parts = [out.with_name(f"{out.stem}.{i}of{shards}{out.suffix}") for i in range(shards)]
    if processes.rank < shards:
        one(parts[processes.rank], (processes.rank, shards))
    processes.wait()
    if processes.first:
        merge_sets(parts, out, device=device, overwrite=overwrite)
        for part in parts:
            part.unlink()
    processes.wait()
    return "done"
