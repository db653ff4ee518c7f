"""The options of `clip-tools libraries`."""

from typing import Annotated

import typer

from clip_tools.cli.options import Models, Output, finish, progress
from clip_tools.paths import MODELS, RESULTS


def libraries(
    rows: Annotated[int, typer.Option(min=1000, help="How many synthetic vectors.")] = 100_000,
    output: Output = RESULTS / "libraries.json",
    models: Models = MODELS,
) -> None:
    """Measure how fast `clip-embed search` and `duplicates` are, and which edits they find at which threshold."""
    from clip_tools.measuring import libraries as verb

    with progress() as tell:
        result = verb.libraries(rows=rows, models=models, tell=tell)
    finish(result, output)
