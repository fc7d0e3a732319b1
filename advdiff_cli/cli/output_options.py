"""Options for how a result is written and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.errors import AdvdiffError


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """How a result is printed."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=options.OUTPUT)] = (
        False
    )
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            help="Print one value only, for scripts: OUT unless said above.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False

    def emit(self, result: Mapping[str, object], text: str, brief: object) -> None:
        """Print a result: as JSON, as the `brief` value, or as text."""
        console.emit(result, text, brief, as_json=self.as_json, quiet=self.quiet)

    @property
    def prints_details(self) -> bool:
        """Whether more than one value is printed."""
        return self.as_json or not self.quiet


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ResultOptions):
    """How a result is written and printed."""

    out: Annotated[Path, typer.Option("-o", "--out", help="Where the result goes.")]
    overwrite: options.Overwrite = False

    def require_folder(self, content: str) -> None:
        """Check that the output can be a folder.

        Raises:
            AdvdiffError: It is a file.
        """
        if self.out.exists() and not self.out.is_dir():
            raise AdvdiffError(f"--out {self.out} is a file; {content} a folder")


@dataclass(frozen=True, kw_only=True)
class PlannedOutputOptions(OutputOptions):
    """How a result is written and printed, or only planned."""

    dry_run: options.DryRun = False
