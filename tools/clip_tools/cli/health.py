"""The options of `clip-tools health`."""

from typing import Annotated

import typer


def health(
    url: Annotated[str, typer.Option(help="The server's URL.")] = "grpc://localhost:8001",
    timeout_s: Annotated[float, typer.Option(help="How long an answer may take.")] = 10.0,
    metrics_url: Annotated[
        str | None,
        typer.Option(help="The server's metrics: a late server passes if it embeds for others."),
    ] = None,
) -> None:
    """Exit 0 if the server embeds an image or is too busy for one; else 1, with the reason."""
    from clip_tools.serving.health import check_health

    check_health(url, timeout_s, metrics_url)
