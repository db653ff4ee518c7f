"""`@takes` turns the fields of a class into options: one declaration gives the option, its default and its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from clip_tools.cli.options import takes
from clip_tools.errors import ToolError


@dataclass(frozen=True)
class Asked:
    names: Annotated[tuple[str, ...], typer.Option(help="Which.")] = ("all",)
    sizes: Annotated[tuple[int, ...], typer.Option("--size", help="How large.")] = (1, 2)
    models: Annotated[Path, typer.Option()] = Path("models")
    hidden: int = 7


@pytest.fixture
def run():
    """Runs the command. Returns what the verb received and what was printed."""
    given = []

    @takes(Asked)
    def verb(options: Asked, output: Annotated[str, typer.Option()] = "out") -> None:
        """What it does."""
        given.append((options, output))

    app = typer.Typer()
    app.command()(verb)

    def call(*arguments: str):
        result = CliRunner().invoke(app, arguments)
        if isinstance(result.exception, ToolError):
            raise result.exception
        return given, result.output

    return call


def test_the_defaults_are_those_of_the_class(run):
    assert run()[0] == [(Asked(), "out")]


def test_a_tuple_is_written_with_commas(run):
    assert run("--names", "one, two", "--size", "8", "--output", "here")[0] == [(Asked(("one", "two"), (8,)), "here")]
    with pytest.raises(ToolError, match="expected whole numbers with commas"):
        run("--size", "large")


def test_the_help_lists_every_annotated_field_and_models_last(run):
    words = run("--help")[1]
    assert "What it does." in words and "How large." in words and "1,2" in words
    assert "hidden" not in words
    assert words.index("--size") < words.index("--output") < words.index("--models")
