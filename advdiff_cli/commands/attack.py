"""`advdiff attack`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.attacks.judged import Achieved

_BATCH = 32


def attack(
    data: options.Data,
    classifier: options.ClassifierName,
    out: options.Out,
    method: Annotated[Literal["pgd", "fgsm"], typer.Option(help="pgd, or fgsm: one step of size eps.")] = "pgd",
    norm: Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")] = "linf",
    eps: options.Eps = 2 / 255,
    steps: Annotated[int | None, typer.Option(min=1, help="Attack iterations.", show_default="40")] = None,
    step_size: Annotated[
        float | None,
        typer.Option(parser=options.fraction, metavar="SIZE", help="Size of a step.", show_default="eps/4"),
    ] = None,
    restarts: Annotated[int | None, typer.Option(min=1, help="Random starts.", show_default="1")] = None,
    seed: options.Seed = 0,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    shard: options.Shard = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Attack a classifier: projected gradient descent from a random start, the best iterate kept, in fp32.

    Prints what the stored attack achieves: accuracy before and after, the share on the ball's surface,
    and the accuracy that is left after rounding to 8 bits inside the ball. Run again, it goes on where it was stopped.

    Example: advdiff attack test.h5 -c classifier --eps 2/255 -o adv.safetensors
    """
    from advdiff_cli.attacks.judged import judge
    from advdiff_cli.data import writer
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.models import zoo
    from advdiff_cli.models.device import resolve_device

    options.need_positive(eps=eps, **({} if step_size is None else {"step_size": step_size}))
    writer.check_suffix(out)
    chip = resolve_device(device)
    patches = open_selected(data, split, labels, limit, rows, shuffle_seed)
    patches.require_labels()
    patches.require_shape()
    folder = zoo.find_classifier(classifier)
    model = zoo.frozen_classifier(folder, chip)
    batch = batch_size or writer.begun(out).get("batch_size", _BATCH)
    parameters = {
        "method": method,
        "norm": norm,
        "eps": eps,
        "seed": seed,
        "batch_size": batch,
        "precision": "fp32",
    }
    parameters |= _iterations(method, eps, steps, step_size, restarts)
    made_by = recipe("attack", parameters, data=patches.recipe_input(), classifier=zoo.fingerprint(folder))
    part = writer.shard_rows(len(patches), batch, cast("Any", shard))
    if dry_run:
        plan = {
            "out": str(out),
            "status": "would attack",
            "patches": part.stop - part.start,
            "parameters": parameters,
        }
        console.emit(plan, f"{out}: would attack {plan['patches']} patches", out, as_json=as_json, quiet=quiet)
        return
    sink = writer.PatchWriter(
        out, made_by, patches, part, shape=patches.require_shape(), device=chip.type, overwrite=overwrite
    )
    if sink.up_to_date:
        console.log(f"{out} is up to date")
    else:
        _run(model, patches, sink, parameters, chip, quiet)
    summary = _summary(judge(model, patches, open_patches(out), part.start, eps, norm, chip))
    status = "up to date" if sink.up_to_date else "done"
    result = {"out": str(out), "status": status, "parameters": parameters, **summary}
    console.emit(result, _text(parameters, summary), out, as_json=as_json, quiet=quiet)


def _iterations(
    method: str, eps: float, steps: int | None, step_size: float | None, restarts: int | None
) -> dict[str, Any]:
    if method == "fgsm":
        if (steps, step_size, restarts) != (None, None, None):
            raise AdvdiffError(
                "--method fgsm is one step of size eps; --steps, --step-size and --restarts do not apply"
            )
        return {"steps": 1, "step_size": eps, "restarts": 1, "random_start": False}
    return {
        "steps": steps or 40,
        "step_size": step_size or eps / 4,
        "restarts": restarts or 1,
        "random_start": True,
    }


def _run(model: Any, patches: Any, sink: Any, parameters: dict[str, Any], chip: Any, quiet: bool) -> None:
    import torch

    from advdiff_cli.attacks.pgd import pgd

    labels = patches.require_labels()
    p = parameters
    settings = {k: p[k] for k in ("eps", "steps", "step_size", "norm", "restarts", "seed")} | {
        "start": p["random_start"]
    }
    with sink, console.progress(len(sink.finished), "attack", done=int(sink.finished.sum()), quiet=quiet) as advance:
        for batch in sink.batches(p["batch_size"]):
            keys = [patches.keys[i] for i in batch.rows]
            truth = torch.from_numpy(labels[batch.rows]).to(chip)
            adv = pgd(model, patches.read(batch.rows).to(chip), truth, rows=keys, **settings)
            sink.write(batch, adv.cpu().numpy())
            advance(batch.count)


def _summary(achieved: "Achieved") -> dict[str, Any]:
    from advdiff_cli.evaluation.intervals import wilson

    n = len(achieved.clean)
    accuracies = {kind: wilson(sum(getattr(achieved, kind)), n).as_dict() for kind in ("clean", "attacked", "rounded")}
    return {"n": n, "accuracy": accuracies, "flipped": achieved.flipped, "on_surface": achieved.surface}


def _text(parameters: dict[str, Any], summary: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.intervals import Estimate

    method, norm, eps = (parameters[k] for k in ("method", "norm", "eps"))
    title = f"{method} {norm} eps {f'{eps * 255:g}/255' if norm == 'linf' else f'{eps:g}'}"
    rows = [(kind, str(Estimate(**value))) for kind, value in summary["accuracy"].items()]
    table = console.table([f"{title}, n = {summary['n']}", "accuracy % [95 % Wilson]"], rows)
    surface = f"on the ball's surface {100 * summary['on_surface']:.1f} % of what was perturbed"
    return f"{table}\nflipped {summary['flipped']}, {surface}"
