"""Option groups: a command that takes a dataclass has its fields as options."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from advdiff_cli.cli.groups import with_option_groups


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int, typer.Option("-w", "--width", min=1)]
    height: int = 2


@dataclass(frozen=True, kw_only=True)
class Color:
    name: str = "red"


@pytest.fixture
def run():
    app = typer.Typer()

    @app.command()
    @with_option_groups
    def draw(size: Size, title: str, color: Color, times: int = 1) -> None:
        """Draw."""
        print(size, title, color, times)

    return lambda *words: CliRunner().invoke(app, words)


def test_fields_are_options(run):
    done = run("-w", "3", "--name", "blue", "a title")
    assert done.output == "Size(width=3, height=2) a title Color(name='blue') 1\n"


def test_required_fields_and_limits_hold(run):
    assert run("a title").exit_code == 2
    assert run("-w", "0", "a title").exit_code == 2


def test_a_signature_lists_fields_in_place_of_groups():
    @with_option_groups
    def draw(size: Size, times: int = 1) -> None: ...

    parameters = inspect.signature(draw).parameters
    assert list(parameters) == ["width", "height", "times"]
    assert (parameters["height"].default, parameters["times"].default) == (2, 1)
