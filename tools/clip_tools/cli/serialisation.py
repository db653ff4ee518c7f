"""The options of `clip-tools serialisation`."""

from typing import Annotated

import typer

from clip_tools.cli.options import Images, Output, finish, numbers, progress
from clip_tools.paths import RESULTS


def serialisation(
    images: Images = "640x480",
    batches: Annotated[str, typer.Option(help="Images per message.")] = "1,2,4,8,16,32",
    runs: Annotated[int, typer.Option(min=1, help="How often to time each; the median counts.")] = 7,
    output: Output = RESULTS / "serialisation.json",
) -> None:
    """Measure size and time of JSON, binary FP32, binary uint8 and JPEG messages, without a server."""
    from clip_tools.measuring import serialisation as verb

    with progress("encoding and decoding"):
        result = verb.serialisation(images, batches=numbers(batches), runs=runs)
    finish(result, output)
