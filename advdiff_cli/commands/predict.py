"""`advdiff predict`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli.cli import options, up_to_date
from advdiff_cli.cli.compute_options import ShardedSeededOptions
from advdiff_cli.cli.defense_options import DefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject


@dataclass(frozen=True, kw_only=True)
class VoteOptions:
    """The vote over draws of a defense's noise."""

    draws: options.Draws = None
    alpha: Annotated[
        float,
        typer.Option(
            help="Abstain where a two-sided binomial test of the vote has a larger p-value.",
            rich_help_panel=options.DEFENSE,
        ),
    ] = 0.05

    def resolve_draws(self, *, defended: bool) -> int:
        """Return the number of draws.

        Raises:
            AdvdiffError: There is no defense to draw for, or no vote of so many draws is decided.
        """
        from advdiff_cli.evaluation.votes import least_draws

        draws = options.resolve_draws(self.draws, defended=defended)
        if not 0 < self.alpha <= 1:
            raise AdvdiffError(f"--alpha must be above 0 and at most 1, not {self.alpha}")
        if defended and draws < (needed := least_draws(self.alpha)):
            raise AdvdiffError(
                f"--draws {draws}: even {draws} draws for one class are not decided at --alpha {self.alpha:g}; "
                f"give at least {needed} draws"
            )
        return draws


@with_option_groups
def predict(
    data: options.Data,
    classifier: options.ClassifierName,
    vote: VoteOptions,
    defense: DefenseOptions,
    rows: RowOptions,
    compute: ShardedSeededOptions,
    output: PlannedOutputOptions,
) -> None:
    """Predict the class of every patch, with or without labels, as a CSV file.

    The columns are name (the file's, or the row's index), decision (0 or 1), p1 (the probability of class 1, averaged
    over draws), share (of the draws for the decision) and abstain (1 where the vote is not decided at --alpha). A
    classifier without a defense never abstains. Draws and batches are those of evaluate. A stopped run resumes when
    the command is run again.

    Example: advdiff predict patches/ -c pcam-resnet18-adapted -m pcam-ddpm -o decisions.csv
    """
    from advdiff_cli.data.table_writer import is_complete_table, table_resume_params

    out = output.out
    if out.suffix.lower() != ".csv":
        raise AdvdiffError(f"--out {out}: predictions are written as .csv")
    defense.check()
    draws = vote.resolve_draws(defended=defense.kind is not None)
    patches = rows.open(data)
    patches.require_shape()
    resume = {} if output.overwrite else table_resume_params(out)
    if resume and _is_finished(classifier, (draws, vote.alpha), defense, compute, patches, resume, out):
        up_to_date.keep(out, dry_run=output.dry_run)
        _emit(output, "up to date", resume)
        return

    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.jobs.predict_table import HEADER, PredictJob
    from advdiff_cli.jobs.sharding import ShardedOutput, TableOutput

    device = compute.resolve_device()
    undefended = compute.load_classifier(classifier, device)
    protection = defense.build(compute, resume)
    precision = "fp32" if protection is None else compute.resolve_precision(device, resume)
    model = undefended.behind(protection, device, precision)
    model.warn_of_size(patches)
    job = PredictJob(model, patches, draws, vote.alpha, compute.seed, device)
    part = shard_rows(len(patches), job.batch_size, compute.shard_pair)
    if output.dry_run:
        is_done = not output.overwrite and is_complete_table(out, job.recipe, part)
        status = "up to date" if is_done else "would predict"
        plan = {"out": str(out), "status": status, "patches": len(part), "draws": draws}
        output.emit(plan, f"{out}: {status}, {len(part)} patches, {draws} draws", out)
        return
    made = OutputSpec(out, job.recipe, device.type, output.overwrite)
    work = follow_rows(job.run, "predict", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), job.batch_size, TableOutput(patches, HEADER, work))
    with process_group(device) as group:
        status = sharded.make(compute.shard_pair, group)
    if status == "up to date":
        up_to_date.keep(out)
    if group.is_main:
        _emit(output, status, job.recipe["parameters"])


def _is_finished(
    classifier: str,
    vote: tuple[int, float],
    defense: DefenseOptions,
    compute: ShardedSeededOptions,
    patches: "PatchSet",
    resume: "Mapping[str, object]",
    out: Path,
) -> bool:
    """Return whether the table is up to date, if nothing has to be loaded to know that."""
    from advdiff_cli.data.output_spec import shard_rows
    from advdiff_cli.data.table_writer import is_complete_table
    from advdiff_cli.jobs.recipes import judging_batch_size, predict_recipe

    protection = defense.find(compute, resume)
    model = compute.find_model(classifier, protection, resume)
    if model is None:
        return False
    draws, alpha = vote
    made_by = predict_recipe(model, patches, draws=draws, alpha=alpha, seed=compute.seed)
    size = judging_batch_size(patches.require_shape(), defended=protection is not None)
    return is_complete_table(out, made_by, shard_rows(len(patches), size, compute.shard_pair))


def _emit(output: PlannedOutputOptions, status: str, parameters: "Mapping[str, object]") -> None:
    """Print how many patches of the table have which decision."""
    from advdiff_cli.data.table_writer import read_csv

    _, lines = read_csv(output.out)
    decided = [decision for _, decision, _, _, abstain in lines if abstain == "0"]
    result: JsonObject = {
        "out": str(output.out),
        "status": status,
        "patches": len(lines),
        "decided": {label: decided.count(label) for label in ("0", "1")},
        "abstained": len(lines) - len(decided),
        "parameters": dict(parameters),
    }
    output.emit(result, _text(result), output.out)


def _text(result: "JsonObject") -> str:
    zero, one = result["decided"].values()
    draws = result["parameters"]["draws"]
    abstained = f", {result['abstained']} abstained (votes of {draws} draws)" if draws > 1 else ""
    return f"{result['out']}: {result['status']}, {result['patches']} patches: {zero} class 0, {one} class 1{abstained}"
