"""`clip-tools report`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.paths import RESULTS


def report(
    folder: Annotated[Path, typer.Argument(help="Where the results are; the report goes there too.")] = RESULTS,
) -> None:
    """Write benchmarks.md and its pictures from the results of a folder."""
    from clip_tools.measuring import report as verb

    for path in verb.report(folder):
        typer.echo(path)
