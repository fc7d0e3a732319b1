"""Commands that run commands of this program, in this process."""

import io
import json
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import typer

from advdiff_cli import console


def run_command(ctx: typer.Context, arguments: Sequence[str], *, heard: bool = True) -> dict[str, Any]:
    """Run a command and return the JSON it prints; `heard` tells whether its lines on stderr are printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), nullcontext() if heard else console.unheard():
        ctx.find_root().command.main([*arguments, "--json"], standalone_mode=False)
    result: dict[str, Any] = json.loads(printed.getvalue())
    return result
