"""Options and output that several verbs of `clip-tools` share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from clip_tools.errors import ToolError
from clip_tools.measuring.results import Tell
from clip_tools.serving.vector_check import CHECK_VECTORS_VARIABLE
from clip_tools.verification.gates import PRECISIONS

ChoiceT = TypeVar("ChoiceT", bound=str)

Port = Annotated[int, typer.Option(min=1, max=65535)]
Models = Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")]
ConfigName = Annotated[
    str | None,
    typer.Option("--model-config-name", help="A named configuration of the deployment, such as cpu-bf16."),
]
CheckVectors = Annotated[
    bool,
    typer.Option(
        envvar=CHECK_VECTORS_VARIABLE, help="Verify the vectors against open_clip, on photographs kept by the export."
    ),
]
Architecture = Annotated[str, typer.Option(help="An open_clip architecture.", envvar="CLIP_MODEL")]
PrecisionName = Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]


def one_of(option: str, name: str, choices: tuple[ChoiceT, ...]) -> ChoiceT:
    """The choice of this name. Raises ToolError for an unknown one."""
    for choice in choices:
        if choice == name:
            return choice
    raise ToolError(f"{option} {name}: expected one of {', '.join(choices)}", exit_code=2)


Images = Annotated[
    str, typer.Option(help="640x480 (real photographs of that size), phone (12 MP originals), or a folder of images.")
]
Output = Annotated[Path, typer.Option(help="Where to write the JSON, and its pictures beside it.")]
Apply = Annotated[
    str | None, typer.Option(help="Write the best setting as configs/NAME.pbtxt of the models that it changes.")
]
Window = Annotated[int, typer.Option(min=100, help="perf_analyzer's measurement window, ms.")]
Stability = Annotated[int, typer.Option(min=1, help="How much three windows may differ, in percent.")]


def numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` -> (1, 4, 16). Raises ToolError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ToolError(f"'{text}': expected whole numbers with commas, such as 1,4,16", exit_code=2) from error


@contextlib.contextmanager
def progress(title: str = "") -> Iterator[Tell]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str, done: int = 0, total: int | None = None, /) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def finish(result: dict[str, Any], output: Path, *, err: bool = False) -> None:
    """Write a measurement's result, its pictures beside it, and print it as Markdown."""
    from clip_tools.measuring.report import keep

    typer.echo(keep(result, output), err=err)


def apply_best(result: dict[str, Any], name: str, models: Path) -> None:
    """Write the best of a search as the configuration `name`; say on stderr what was written and how to serve it."""
    from clip_tools.measuring.sweep import apply

    paths = apply(result, name, models)
    for path in paths:
        typer.echo(f"written: {path}", err=True)
    how = f"serve it: clip-tools serve --model-config-name={name}" if paths else "the committed configuration is best"
    typer.echo(how, err=True)
