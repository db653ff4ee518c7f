"""`clip-tools serialisation`, its options."""

from typing import Annotated

import typer

from clip_tools.cli.options import Images, Output, finish, numbers, progress
from clip_tools.paths import RESULTS


def serialisation(
    images: Images = "640x480",
    batches: Annotated[str, typer.Option(help="Images a message.")] = "1,2,4,8,16,32",
    runs: Annotated[int, typer.Option(min=1, help="How often each is timed; the median counts.")] = 7,
    output: Output = RESULTS / "serialisation.json",
) -> None:
    """Bytes and time of JSON, binary FP32, binary uint8 and JPEG, without a server."""
    from clip_tools.measuring import serialisation as verb

    with progress("encoding and decoding"):
        result = verb.serialisation(images, batches=numbers(batches), runs=runs)
    finish(result, output)
