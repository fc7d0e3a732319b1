"""`advdiff report`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.report import GALLERY_PATCHES

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject


@dataclass(frozen=True, kw_only=True)
class ContentOptions:
    """The content of the page."""

    result: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: bars of accuracies, from evaluate CLEAN ATTACKED --json. May be repeated."),
    ] = None
    sweep: Annotated[
        list[str] | None, typer.Option(help="FOLDER of a sweep, or NAME=FOLDER to name it. May be repeated.")
    ] = None
    certificates: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: certified accuracy over the radius, from certify. May be repeated."),
    ] = None
    suite: Annotated[Path | None, typer.Option(help="Folder of robustness.")] = None
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Purification against adversarial attacks"


@dataclass(frozen=True, kw_only=True)
class GalleryOptions:
    """The gallery of patches."""

    clean: Annotated[str | None, typer.Option(help="Clean patches of the gallery.")] = None
    attacked: Annotated[str | None, typer.Option(help="The same patches, attacked.")] = None
    classifier: Annotated[str | None, typer.Option("-c", "--classifier", help="Classifier of the gallery.")] = None
    patches: Annotated[int, typer.Option(min=1, help="Number of patches in the gallery.")] = GALLERY_PATCHES
    index: Annotated[
        str | None,
        typer.Option(help="Rows of the gallery by index, such as 3,17.", show_default="those that changed most"),
    ] = None


@with_option_groups
def report(
    content: ContentOptions,
    gallery: GalleryOptions,
    purifier: PurifierOptions,
    rows: RowOptions,
    compute: SeededComputeOptions,
    output: OutputOptions,
) -> None:
    """Write results to one self-contained HTML page, and its plots as SVG and PNG next to it.

    Bars come from evaluate --json, curves from sweep, and the table of attacks from robustness. The gallery is made of
    clean and attacked patches, which are purified on the first judging draw. The page holds the recipe of every number.
    With -q, print the path of the page.

    Example: advdiff report --result undefended=plain.json --sweep sweep/ --suite suite/ -o report/
    """
    from advdiff_cli.certification.summary import certificate_curves
    from advdiff_cli.report.accuracy_bar import accuracy_bar
    from advdiff_cli.report.page import PAGE, PANEL, Report
    from advdiff_cli.report.result_files import Evaluation, Suite, Sweep, read_result, read_results

    out = output.out
    output.require_folder("a report goes to")
    has_gallery = gallery.clean or gallery.attacked
    if not (content.result or content.sweep or content.certificates or content.suite or has_gallery):
        raise AdvdiffError(
            "nothing to report: give --result, --sweep, --certificates, --suite, or --clean and --attacked"
        )
    named = [_named(text, "give --result NAME=FILE") for text in content.result or []]
    page = Report(content.title, read_results(named, Evaluation))
    for name, found in page.results.items():
        accuracy_bar(name, found)  # raises before anything is written
    page.sweeps = read_results([_sweep_file(text) for text in content.sweep or []], Sweep)
    for name, path in (_named(text, "give --certificates NAME=FILE") for text in content.certificates or []):
        if name in page.certificates:
            raise AdvdiffError(f"two tables of certificates are called {name}; give each its own name")
        page.certificates[name] = certificate_curves(path)
    if content.suite:
        page.suite = read_result(_suite_file(content.suite), Suite)
    with tempfile.TemporaryDirectory() as scratch:
        if has_gallery:
            page.panel = Path(scratch) / PANEL
            page.gallery = _gallery(gallery, purifier, rows, compute, page.panel, quiet=output.quiet)
        files = page.write(out, overwrite=output.overwrite)
    text = "\n".join(str(out / f) for f in files)
    output.emit({"out": str(out), "page": str(out / PAGE), "files": files}, text, out / PAGE)


def _named(text: str, advice: str) -> tuple[str, Path]:
    """Return the two halves of NAME=PATH.

    Raises:
        AdvdiffError: The text has another form.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise AdvdiffError(f"{text}: {advice}")
    return name, Path(path)


def _sweep_file(text: str) -> tuple[str, Path]:
    is_folder = Path(text).is_dir()
    advice = "no such folder; --sweep takes FOLDER or NAME=FOLDER"
    name, folder = (text, Path(text)) if is_folder else _named(text, advice)
    return name, folder / "sweep.json"


def _suite_file(folder: Path) -> Path:
    """Return the result in a folder of robustness.

    Raises:
        AdvdiffError: There is none, or the suite is unfinished.
    """
    file = folder / "robustness.json"
    if not file.is_file() and any(folder.glob("*.safetensors*")):
        raise AdvdiffError(f"the suite in {folder} is unfinished; run the same advdiff robustness command again")
    return file


def _gallery(
    gallery: GalleryOptions,
    purifier: PurifierOptions,
    rows: RowOptions,
    compute: SeededComputeOptions,
    panel: Path,
    *,
    quiet: bool,
) -> "JsonObject":
    """Return the content of the gallery, and draw its first patches as the picture `panel`."""
    from advdiff_cli.report.gallery import GalleryModel, PairedSets, amplification_eps, build_gallery, judge_pairs

    if not (gallery.clean and gallery.attacked and gallery.classifier):
        raise AdvdiffError("a gallery needs --clean, --attacked and -c")
    device = compute.resolve_device()
    defense, precision = purifier.build(compute), compute.resolve_precision(device)
    model = compute.load_classifier(gallery.classifier, device).behind(defense, device, precision)
    pairs = PairedSets.match(*rows.open_sets([gallery.clean, gallery.attacked]))
    if not len(pairs):
        raise AdvdiffError(f"{gallery.attacked} was not made from rows of {gallery.clean}")
    model.warn_of_size(pairs.attacked)
    eps = amplification_eps(pairs.attacked)
    chosen = None if gallery.index is None else _rows_of(gallery.index, pairs.clean.index[pairs.clean_rows].tolist())
    by = GalleryModel(model, device, compute.seed)
    with console.progress(len(pairs), "report: judge", quiet=quiet) as advance:
        judged = judge_pairs(pairs, by, advance)
    return build_gallery(pairs, judged, by, eps, chosen or gallery.patches, panel)


def _rows_of(text: str, indices: list[int]) -> list[int]:
    """Return the positions of the rows whose indices `text` lists."""
    found = []
    for one in text.split(","):
        if not one.strip().isdecimal() or int(one) not in indices:
            raise AdvdiffError(f"--index {one}: the attacked set has no such row")
        found.append(indices.index(int(one)))
    return found
