"""`advdiff models`."""

from advdiff_cli import console, options


def models(
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the bundled models.

    Example: advdiff models
    """
    from advdiff_cli.models import registry

    known = registry.list_bundled()
    rows = [(m["name"], m["kind"], m["arch"], f"{m['bytes'] / 1e6:.1f} MB") for m in known]
    text = console.table(("name", "kind", "architecture", "size"), rows)
    console.emit({"models": known}, text, "\n".join(m["name"] for m in known), as_json=as_json, quiet=quiet)
