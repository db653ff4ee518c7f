"""The options of `clip-tools compare`."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(help="A result of clip-tools bench.")],
    after: Annotated[Path, typer.Argument(help="The result to compare with it.")],
) -> None:
    """Show what changed between two results of bench, and whether it exceeds the noise."""
    from clip_tools.measuring import compare as verb
    from clip_tools.measuring import results

    typer.echo(verb.text(verb.compare(results.read(before), results.read(after))))
