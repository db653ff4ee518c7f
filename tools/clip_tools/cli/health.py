"""`clip-tools health`, its options."""

from typing import Annotated

import typer


def health(
    url: Annotated[str, typer.Option(help="The server's URL.")] = "grpc://localhost:8001",
    timeout_s: Annotated[float, typer.Option(help="How long an answer may take.")] = 10.0,
    metrics_url: Annotated[
        str | None,
        typer.Option(help="Its metrics: one that embeds for others may be late with its answer."),
    ] = None,
) -> None:
    """Exit 0 when the server embeds an image or has no room for one, 1 with the reason when it does not."""
    from clip_tools.serving.health import check_health

    check_health(url, timeout_s, metrics_url)
