"""`advdiff models`."""

from advdiff_cli import console
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions


@with_option_groups
def models(output: ResultOptions) -> None:
    """List the bundled models. With -q, print their names.

    Example: advdiff models
    """
    from advdiff_cli.models.registry import list_bundled

    bundled = list_bundled()
    rows = [(m.name, m.kind, m.arch, f"{m.bytes / 1e6:.1f} MB") for m in bundled]
    text = console.table(("name", "kind", "architecture", "size"), rows)
    output.emit({"models": [m.as_dict() for m in bundled]}, text, "\n".join(m.name for m in bundled))
