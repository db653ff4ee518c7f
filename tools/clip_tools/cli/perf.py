"""`clip-tools perf`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Output, measured, takes
from clip_tools.measuring.options import PerfOptions
from clip_tools.paths import RESULTS


@takes(PerfOptions)
def perf(
    options: PerfOptions,
    output: Output = RESULTS / "perf.json",
    write_input: Annotated[
        Path | None,
        typer.Option(
            help="Only write perf_analyzer's input JSON to this file. "
            "docs/container.md shows how to run perf_analyzer with it from another machine."
        ),
    ] = None,
) -> None:
    """Run the real perf_analyzer against a running server, with many different photographs.

    Prints the levels as JSON on stdout and as a table on stderr.
    """
    from clip_tools.measuring import perf as verb

    if write_input:
        count = verb.write_input(options, write_input)
        typer.echo(f"{write_input}: {count} images for --input-data", err=True)
        return
    result = measured(partial(verb.perf, folder=output.parent), options, output, "perf_analyzer", err=True)
    typer.echo(json.dumps(result["levels"]))
