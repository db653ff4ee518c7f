"""The options of `clip-tools ab`."""

from typing import Annotated

import typer

from clip_tools.cli.options import progress
from clip_tools.measuring.options import Images


def ab(
    url_a: Annotated[str, typer.Argument(help="A running server, grpc://HOST:8001.")],
    url_b: Annotated[str, typer.Argument(help="The other server, grpc://HOST:8001.")],
    images: Images = "640x480",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per request.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often to measure each server, in turns.")] = 3,
    seconds: Annotated[float, typer.Option(help="The duration of one measurement.")] = 8.0,
) -> None:
    """Send the same photographs to two running servers in turns; compare their speed, times by step and vectors."""
    from clip_tools.measuring import ab as verb

    urls = (url_a, url_b)
    with progress() as tell:
        windows, agreement = verb.ab(
            urls, images, batch=batch, concurrency=concurrency, rounds=rounds, seconds=seconds, tell=tell
        )
    typer.echo(verb.text(urls, windows, agreement))
