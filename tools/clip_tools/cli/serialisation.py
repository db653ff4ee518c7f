"""`clip-tools serialisation`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Images, numbers
from clip_tools.paths import RESULTS


def serialisation(
    images: Images = "640x480",
    batches: Annotated[str, typer.Option(help="Images a message.")] = "1,2,4,8,16,32",
    runs: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 7,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "serialisation.json",
) -> None:
    """Bytes and time of JSON, binary FP32, binary uint8 and JPEG, without a server."""
    from rich.console import Console

    from clip_tools.measuring import results, sections
    from clip_tools.measuring import serialisation as verb

    with Console(stderr=True).status("encoding and decoding"):
        result = verb.serialisation(images, batches=numbers(batches), runs=runs)
    results.write(result, output)
    typer.echo(sections.serialisation_section(output.stem, result).text)
