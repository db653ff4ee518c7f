"""The options of `clip-tools soak`."""

from typing import Annotated

import typer

from clip_tools.cli.options import ConfigName, Images, Models, Output, finish, progress
from clip_tools.paths import MODELS, RESULTS


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the traffic lasts.")] = 60.0,
    clients: Annotated[int, typer.Option(min=1, help="The number of clients, each with its own connection.")] = 8,
    bad_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The share of bad calls.")] = 0.1,
    url: Annotated[
        str | None, typer.Option(help="A running server on this machine, grpc://HOST:PORT; by default one is started.")
    ] = None,
    config_name: ConfigName = None,
    images: Images = "640x480",
    seed: Annotated[int, typer.Option(help="The same seed gives each client the same calls.")] = 0,
    output: Output = RESULTS / "soak.json",
    models: Models = MODELS,
) -> None:
    """Send good and bad traffic for an hour and watch the server. Exit 1 if a request was lost or a resource grew."""
    from clip_tools.measuring import soak as verb

    options = verb.SoakOptions(
        minutes=minutes,
        clients=clients,
        bad_share=bad_share,
        url=url,
        config_name=config_name,
        images=images,
        seed=seed,
        models=models,
    )
    with progress() as tell:
        result = verb.soak(options, tell=tell)
    finish(result, output)
    if result["problems"]:
        raise typer.Exit(1)
