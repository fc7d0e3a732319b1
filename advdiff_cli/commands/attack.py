"""`advdiff attack`."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from advdiff_cli import console, options
from advdiff_cli.cli.batch_size import batch_size as sized
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.sharding import fill
from advdiff_cli.purification.defense import Defence, asked_defence, attack_precision

if TYPE_CHECKING:
    from advdiff_cli.data.patch_writer import PatchWriter

_BATCH = 32


def attack(
    data: options.Data,
    classifier: options.ClassifierName,
    out: options.Out,
    ddpm: options.DdpmName = None,
    method: Annotated[
        Literal["pgd", "fgsm", "apgd", "square", "fab", "ensemble", "random", "paper"],
        typer.Option(
            help="ensemble: each patch's worst of APGD, Square and, where valid, FAB; random: a control; paper: the "
            "weak attack of the paper's code."
        ),
    ] = "pgd",
    norm: Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")] = "linf",
    eps: options.Eps = None,
    loss: Annotated[
        Literal["ce", "margin"] | None,
        typer.Option(help="Cross-entropy, or the margin between the classes.", show_default="ce; square: margin"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Attack iterations.", show_default="pgd: 40, paper: 5, else 100")
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(parser=options.fraction, metavar="SIZE", help="Size of a step of pgd.", show_default="eps/4"),
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Proposals of square.", show_default="1000")] = None,
    restarts: Annotated[int | None, typer.Option(min=1, help="Random starts.", show_default="1")] = None,
    defense: options.Defense = None,
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    gradient: Annotated[
        Literal["blind", "bpda", "surrogate", "full"] | None,
        typer.Option(
            help="full: exact, through the defence; bpda: the defence forward, the identity backward; surrogate: "
            "through one of --attack-sampler-steps; blind: of the classifier alone.",
            show_default="full",
            rich_help_panel=options.DEFENCE,
        ),
    ] = None,
    eot: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws of the defence's noise a gradient averages.",
            show_default="8",
            rich_help_panel=options.DEFENCE,
        ),
    ] = None,
    attack_sampler_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Sampler steps of the surrogate.", rich_help_panel=options.DEFENCE),
    ] = None,
    fixed_draw: Annotated[
        bool | None,
        typer.Option(
            "--fixed-draw",
            help="Attack one draw, known beforehand: the first that evaluate takes.",
            rich_help_panel=options.DEFENCE,
        ),
    ] = None,
    seed: options.Seed = 0,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    shard: options.Shard = None,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    compiled: options.Compile = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Attack a classifier, or the defence before it (-m or --defense) by a gradient through it.

    Prints what the stored attack achieves: accuracy before and after, the share on the ball's surface, and the accuracy
    that is left after rounding to 8 bits inside the ball. Run again, it goes on where it was stopped.

    Example: advdiff attack test.h5 -c pcam-resnet18 --eps 2/255 -o adv.safetensors
    """
    from advdiff_cli.attacks.spec import aim, resolve
    from advdiff_cli.data import patch_writer
    from advdiff_cli.data.distributed import together
    from advdiff_cli.jobs.attack import attack_recipe, attack_rows
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device

    size = options.budget(norm, eps)
    options.need_positive(**({} if step_size is None else {"step_size": step_size}))
    patch_writer.check_suffix(out)
    chip = resolve_device(device)
    patches = open_selected(data, split, labels, limit, rows, shuffle_seed)
    patches.require_labels()
    model, fingerprint = registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle)
    defence = asked_defence(defense, ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    asked = {
        "loss": loss, "steps": steps, "step_size": step_size, "queries": queries, "restarts": restarts,
        "gradient": gradient, "eot": eot, "attack_sampler_steps": attack_sampler_steps, "fixed_draw": fixed_draw,
    }  # fmt: skip
    settings = resolve(method, norm, size, asked, defended=defence is not None)
    begun = {} if overwrite else patch_writer.begun(out)
    exact = "fp32" if defence is None else attack_precision(precision, begun, chip)
    judged = model if defence is None else defence.before(model, chip, exact)
    batch = sized(
        batch_size, begun, _BATCH, judged, patches.require_shape(), len(patches), chip, shard=shard, graph=True
    )
    made_by = attack_recipe(
        settings, seed, batch, patches.recipe_input(), fingerprint,
        None if defence is None else defence.parameters, None if defence is None else defence.model, exact,
        compiled=compiled,
    )  # fmt: skip
    parameters = made_by["parameters"]
    if compiled:
        _compile(defence, parameters, chip)
    target = aim(model, None if defence is None else defence.purifier, settings, exact)
    part_of = cast("tuple[int, int] | None", shard)
    part = patch_writer.shard_rows(len(patches), batch, part_of)
    if dry_run:
        return _tell_plan(out, part.stop - part.start, parameters, as_json, quiet)

    work = _followed(partial(attack_rows, target, parameters, patches, device=chip), quiet)
    with together() as processes:
        status = fill(out, made_by, patches, part_of, processes, work, device=chip.type, overwrite=overwrite)
    if not processes.first:
        return
    result = {"out": str(out), "status": status, "parameters": parameters, "precision": exact}
    if not quiet or as_json:
        result |= _summary(judged, patches, out, part, parameters, chip, quiet)
    console.emit(result, "" if quiet else _text(parameters, result), out, as_json=as_json, quiet=quiet)


def _tell_plan(out: Path, count: int, parameters: dict[str, Any], as_json: bool, quiet: bool) -> None:
    plan = {"out": str(out), "status": "would attack", "patches": count, "parameters": parameters}
    console.emit(plan, f"{out}: would attack {count} patches", out, as_json=as_json, quiet=quiet)


def _compile(defence: Defence | None, parameters: dict[str, Any], chip: Any) -> None:
    from advdiff_cli.jobs.attack import differentiates

    if defence is None or not differentiates(parameters):
        raise AdvdiffError("--compile: this attack takes no gradient of a U-Net; leave it out")
    defence.compile_unet(chip)


def _followed(rows: "Callable[[PatchWriter], Iterator[int]]", quiet: bool) -> "Callable[[PatchWriter], None]":
    def work(sink: "PatchWriter") -> None:
        done = int(sink.finished.sum())
        with console.progress(len(sink.finished), "attack", done=done, quiet=quiet) as advance:
            for count in rows(sink):
                advance(count)

    return work


def _summary(
    judged: Any, patches: Any, out: Path, part: Any, parameters: dict[str, Any], chip: Any, quiet: bool
) -> dict[str, Any]:  # fmt: skip
    import numpy as np

    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.evaluation.attack_outcome import DRAWS, judge
    from advdiff_cli.evaluation.statistics import mean_share

    eps, norm, seed = (parameters[k] for k in ("eps", "norm", "seed"))
    draws = 1 if parameters.get("fixed_draw") else DRAWS  # the draw it knows, or ones it does not
    with console.progress(part.stop - part.start, "attack: judge", quiet=quiet) as advance:
        achieved = judge(judged, patches, open_patches(out), part.start, eps, norm, chip, seed, draws, advance)
    labels = patches.require_labels()[part.start : part.stop]
    accuracies = {
        kind: mean_share(np.asarray(getattr(achieved, kind))).as_dict() for kind in ("clean", "attacked", "rounded")
    }
    return {
        "n": len(labels),
        "draws": achieved.draws,
        "accuracy": accuracies,
        "flipped": achieved.flipped,
        "on_surface": achieved.surface,
    }


def _text(parameters: dict[str, Any], summary: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.statistics import Estimate

    method, norm, eps = (parameters[k] for k in ("method", "norm", "eps"))
    title = f"{method} {norm} eps {f'{eps * 255:g}/255' if norm == 'linf' else f'{eps:g}'}"
    rows = [(kind, str(Estimate(**value))) for kind, value in summary["accuracy"].items()]
    over = "95 %" if summary["draws"] == 1 else f"95 %, mean of {summary['draws']} draws"
    table = console.table([f"{title}, n = {summary['n']}", f"accuracy % [{over}]"], rows)
    surface = f"on the ball's surface {100 * summary['on_surface']:.1f} % of what was perturbed"
    ran = f"\nensemble of {', '.join(parameters['attacks'])}" if "attacks" in parameters else ""
    return f"{table}\nflipped {summary['flipped']}, {surface}{ran}"
