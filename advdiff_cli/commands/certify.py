"""`advdiff certify`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from advdiff_cli import console
from advdiff_cli.cli import options, up_to_date
from advdiff_cli.cli.certificate_options import CertificateOptions
from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import CertifiedDefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.jobs.certify import CertifyJob
    from advdiff_cli.jobs.recipes import CertifySettings
    from advdiff_cli.models.precision import Precision


@with_option_groups
def certify(
    data: options.Data,
    classifier: options.ClassifierName,
    certificate: CertificateOptions,
    defense: CertifiedDefenseOptions,
    rows: RowOptions,
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Prove which decisions no attack of a size can change, by randomized smoothing, with or without labels.

    The proof is of the vote over infinitely many draws of the defense's noise (Cohen et al. 2019; one denoising step:
    Carlini et al. 2023). Without --eps and --radius, each patch takes n0 + n draws and gets the largest radius that
    they prove. With a size, draws stop as soon as the size is proved or out of reach. The table has a row for each
    patch: decision, abstain (1 if the draws taken do not prove even the decision; with a size, they may stop before),
    radius (l2), draws and seconds. A stopped run resumes when the command is run again.

    Example: advdiff certify patches/ -c pcam-resnet18-adapted --eps 2/255 -o proved.csv
    """
    from advdiff_cli.data.table_writer import is_complete_table, table_resume_params

    out, settings = output.out, certificate.settings()
    if out.suffix.lower() != ".csv":
        raise AdvdiffError(f"--out {out}: certificates are written as .csv")
    patches = rows.open(data)
    patches.require_shape()
    compute.refuse_auto_for_parts()
    if certificate.tsv is not None:
        from advdiff_cli.data.recorded_files import check_not_input

        check_not_input(certificate.tsv, patches.inputs)
        _check_tsv(certificate.tsv, output, patches, sharded=compute.shard is not None)
    resume = {} if output.overwrite else table_resume_params(out)
    if resume and _is_finished(classifier, settings, defense, compute, patches, resume, out):
        up_to_date.keep(out, dry_run=output.dry_run)
        _emit(output, certificate, "up to date")
        return

    from advdiff_cli.certification.certificate_file import HEADER
    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.jobs.sharding import ShardedOutput, TableOutput

    job = _job(classifier, settings, defense, compute, patches, resume)
    _warn_of_unreachable_sizes(job)
    part = shard_rows(len(patches), 1, compute.shard_pair)
    if output.dry_run:
        is_done = not output.overwrite and is_complete_table(out, job.recipe, part)
        status, n, most = "up to date" if is_done else "would certify", len(part), settings.n0 + settings.n
        plan = {"out": str(out), "status": status, "patches": n, "most_draws": most, "sigma": job.smoothed.sigma}
        output.emit(plan, f"{out}: {status}, {n} patches, at most {most:,} draws each", out)
        return
    if certificate.tsv is not None:
        _tsv_output(output, certificate.tsv, job.recipe)  # refused now rather than after all draws
    made = OutputSpec(out, job.recipe, job.device.type, output.overwrite)
    work = follow_rows(job.run, "certify", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), 1, TableOutput(patches, HEADER, work))
    with process_group(job.device) as group:
        status = sharded.make(compute.shard_pair, group)
    if status == "up to date":
        up_to_date.keep(out)
    if group.is_main:
        _emit(output, certificate, status)


def _job(
    classifier: str,
    settings: "CertifySettings",
    defense: CertifiedDefenseOptions,
    compute: ShardedComputeOptions,
    patches: "PatchSet",
    resume: Mapping[str, object],
) -> "CertifyJob":
    """Return the job, with the models loaded."""
    from advdiff_cli.certification.smoothing import SmoothedClassifier
    from advdiff_cli.cli.batch_size import resolve_batch_size
    from advdiff_cli.jobs.certify import CertifyJob

    device, shape = compute.resolve_device(), patches.require_shape()
    precision = _precision(compute, settings)
    undefended = compute.load_classifier(classifier, device)
    model = undefended.behind(defense.build(compute, resume), device, precision)
    model.warn_of_size(patches)
    smoothed = SmoothedClassifier(model.protected, shape, compute.seed, settings.sound)
    size = resolve_batch_size(compute.batch_size, resume, model.module, shape, device, graph=False)
    return CertifyJob(smoothed, model.spec, patches, settings, size, device)


def _check_tsv(tsv: Path, output: PlannedOutputOptions, patches: "PatchSet", *, sharded: bool) -> None:
    """Check that the table of other tools can be written, before anything is computed.

    Raises:
        AdvdiffError: It would hold a shard, there are no labels, or no folder, or it is the output itself, or someone
            else's file.
    """
    from advdiff_cli.data.recorded_files import check_own_name, is_recorded, record_of

    check_own_name(tsv)
    if sharded:
        raise AdvdiffError(f"--tsv {tsv} is of all patches: merge the shards, then run certify without --shard")
    if patches.labels is None:
        raise AdvdiffError(f"--tsv {tsv}: the table of other tools needs labels; give --labels FILE.csv")
    if not tsv.parent.is_dir():
        raise AdvdiffError(f"--tsv {tsv}: there is no folder {tsv.parent}")
    if tsv.resolve() == output.out.resolve():
        raise AdvdiffError(f"--tsv {tsv} is --out itself; give another name")
    if tsv.exists() and not output.overwrite and not is_recorded(tsv, record_of(tsv)):
        raise AdvdiffError(f"{tsv} exists and was not made by this command; give --overwrite or another name")


def _warn_of_unreachable_sizes(job: "CertifyJob") -> None:
    """Say which sizes no patch can be certified at, even if all draws agree."""
    from advdiff_cli.certification.bounds import threshold
    from advdiff_cli.certification.confidence_sequence import least_sequential_draws

    smoothed, how = job.smoothed, job.procedure
    for radius in how.targets or ():
        q = threshold(radius, smoothed.sigma, distance=smoothed.distance)
        if least_sequential_draws(q, how.alpha, how.n) is None:
            console.warn(
                f"l2 {radius:.3g} cannot be proved at sigma {smoothed.sigma:.3g} by {how.n:,} draws that agree: "
                "give a larger --t-star or --n, or a classifier that reads less of each patch"
            )


def _precision(compute: ShardedComputeOptions, settings: "CertifySettings") -> "Precision":
    """Return the precision: fp32, unless noised patches are exact.

    Raises:
        AdvdiffError: Another one was asked for.
    """
    if compute.precision in ("auto", "fp32"):
        return "fp32"
    if not settings.sound:
        raise AdvdiffError(
            f"--precision {compute.precision}: rounding of a noised patch is not a part of the proof; add --sound, "
            "which makes noised patches exact, or leave the precision out"
        )
    return compute.resolve_precision(compute.resolve_device())


def _is_finished(
    classifier: str,
    settings: "CertifySettings",
    defense: CertifiedDefenseOptions,
    compute: ShardedComputeOptions,
    patches: "PatchSet",
    resume: Mapping[str, object],
    out: Path,
) -> bool:
    """Return whether the table is up to date, if nothing has to be loaded to know that."""
    from advdiff_cli.cli.batch_size import known_batch_size
    from advdiff_cli.data.output_spec import shard_rows
    from advdiff_cli.data.table_writer import is_complete_table
    from advdiff_cli.jobs.recipes import certify_recipe

    model = compute.find_model(classifier, defense.find(compute, resume), {"precision": _precision(compute, settings)})
    size = known_batch_size(compute.batch_size, resume)
    if model is None or size is None or "sigma" not in resume:
        return False
    derived = {k: resume[k] for k in ("sigma", "dimension")}
    made_by = certify_recipe(model, patches, settings, seed=compute.seed, batch_size=size, derived=derived)
    return is_complete_table(out, made_by, shard_rows(len(patches), 1, compute.shard_pair))


def _emit(output: PlannedOutputOptions, certificate: CertificateOptions, status: str) -> None:
    """Print what is proved, and write the table of other tools."""
    from advdiff_cli.certification.certificate_file import certificate_provenance, read_certificates, write_tsv
    from advdiff_cli.certification.summary import summarize, told_sizes

    made, found = certificate_provenance(output.out), read_certificates(output.out)
    parameters = made["recipe"]["parameters"]
    if certificate.tsv is not None and not output.dry_run:
        from advdiff_cli.data.recorded_files import recorded_write

        written = _tsv_output(output, certificate.tsv, made["recipe"])
        with recorded_write(written, certificate.tsv) as temporary:
            write_tsv(temporary, found)
    result = summarize(found, told_sizes({**parameters, **certificate.asked_sizes()}))
    result = {"out": str(output.out), "status": status, **result, "alpha": parameters["alpha"]}
    result |= {"sigma": parameters["sigma"], "parameters": dict(parameters)}
    output.emit(result, _text(result), output.out)


def _tsv_output(output: PlannedOutputOptions, tsv: Path, recipe: "Provenance") -> "OutputSpec":
    """Return the record of the table of other tools, which may be written.

    Raises:
        AdvdiffError: Another file is there.
    """
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.recorded_files import check_replaceable, record_of

    spec = OutputSpec(record_of(tsv), recipe, overwrite=output.overwrite)
    check_replaceable(spec, [tsv], [output.out])
    return spec


def _text(result: "JsonObject") -> str:
    from advdiff_cli.cli.tables import cell, certified_rows

    labeled = result["vote_accuracy"] is not None
    vote = f", vote accuracy {cell(result['vote_accuracy'])} %" if labeled else ""
    fewest, most = result["draws_range"]
    draws = f"{most:,} draws each"
    if fewest < most:
        draws = f"{result['draws'] / result['n']:,.1f} draws a patch on average ({fewest:,} to {most:,})"
    first = f"{result['out']}: {result['status']}, {result['n']} patches, {draws}"
    first += f", sigma {result['sigma']:.3f}{vote}, {result['abstained']} abstained"
    what = "certified accuracy % [95 %]" if labeled else "certified patches % [95 %]"
    table = console.table(("attacks", "size", "l2 radius", what), certified_rows(result["certified"]))
    proof = (
        f"proved for the vote over infinitely many draws; each patch may be wrong with probability {result['alpha']:g}"
    )
    return f"{first}\n{table}\n{proof}"
