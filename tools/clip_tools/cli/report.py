"""The options of `clip-tools report`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.paths import RESULTS


def report(
    folder: Annotated[Path, typer.Argument(help="The folder with the results, also for the report.")] = RESULTS,
) -> None:
    """Write benchmarks.md and its pictures from the results in a folder."""
    from clip_tools.measuring import report as verb

    for path in verb.report(folder):
        typer.echo(path)
