"""Options and output that several verbs of `clip-tools` share."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from clip_tools.accuracy.gates import PRECISIONS
from clip_tools.errors import ToolError
from clip_tools.progress import Tell
from clip_tools.serving.vector_check import CHECK_VECTORS_VARIABLE

ChoiceT = TypeVar("ChoiceT", bound=str)

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


Output = Annotated[Path, typer.Option(help="Where to write the JSON, and its pictures beside it.")]


def numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` -> (1, 4, 16). Raises ToolError for anything else."""
    try:
        return tuple(map(int, _parts(text)))
    except ValueError as error:
        raise ToolError(f"'{text}': expected whole numbers with commas, such as 1,4,16", exit_code=2) from error


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a verb whose first parameter is of this dataclass: each annotated field becomes an option.

    The verb's other parameters follow, and `models` comes last. A tuple is written with commas.
    """
    hints = get_type_hints(options, include_extras=True)
    shown = {field.name: field.default for field in fields(options) if get_origin(hints[field.name]) is Annotated}

    def parameter(name: str, default: Any) -> Parameter:
        hint, option = get_args(hints[name])
        if get_origin(hint) is tuple:
            hint, default = str, ",".join(map(str, default))
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])

    def value(name: str, given: Any) -> Any:
        hint, _ = get_args(hints[name])
        if get_origin(hint) is not tuple:
            return given
        return numbers(given) if get_args(hint)[0] is int else _parts(given)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            asked = options(**{name: value(name, given.pop(name)) for name in shown})
            verb(asked, **given)

        _, *own = signature(verb).parameters.values()
        every = [parameter(*one) for one in shown.items()] + [one.replace(kind=Parameter.KEYWORD_ONLY) for one in own]
        command.__signature__ = Signature(sorted(every, key=lambda one: one.name == "models"))  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        return command

    return decorate


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


def measured(
    verb: Callable[..., dict[str, Any]], options: Any, output: Path, title: str = "", *, err: bool = False
) -> dict[str, Any]:
    """The result of a measuring verb with these options, written and printed, to stderr with `err`."""
    with progress(title) as tell:
        result = verb(options, tell=tell)
    finish(result, output, err=err)
    return result


def finish(result: dict[str, Any], output: Path, *, err: bool = False) -> None:
    """Write a measurement's result, its pictures beside it, and print it as Markdown."""
    from clip_tools.measuring.report import keep

    typer.echo(keep(result, output), err=err)


def apply_best(result: dict[str, Any], name: str | None, models: Path) -> None:
    """Write the best of a search as the configuration `name`; say on stderr what was written and how to serve it."""
    from clip_tools.measuring.sweep import apply

    if name is None:
        return
    paths = apply(result, name, models)
    for path in paths:
        typer.echo(f"written: {path}", err=True)
    how = f"serve it: clip-tools serve --model-config-name={name}" if paths else "the committed configuration is best"
    typer.echo(how, err=True)
