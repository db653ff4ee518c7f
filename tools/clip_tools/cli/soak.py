"""`clip-tools soak`."""

import typer

from clip_tools.cli.options import Output, measured, takes
from clip_tools.measuring.options import SoakOptions
from clip_tools.paths import RESULTS


@takes(SoakOptions)
def soak(options: SoakOptions, output: Output = RESULTS / "soak.json") -> None:
    """Send good and bad traffic for an hour and watch the server. Exit 1 if a request was lost or a resource grew."""
    from clip_tools.measuring import soak as verb

    if measured(verb.soak, options, output)["problems"]:
        raise typer.Exit(1)
