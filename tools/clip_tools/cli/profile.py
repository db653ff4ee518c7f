"""The options of `clip-tools profile`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Apply, Images, Models, Output, Port, apply_best, finish, progress
from clip_tools.paths import MODELS, RESULTS, ROOT


def profile(
    mode: Annotated[str, typer.Option(help="local (the embedded server), docker, or remote (a running server).")] = (
        "local"
    ),
    apply: Apply = None,
    images: Images = "640x480",
    folder: Annotated[
        Path, typer.Option(help="The folder for Model Analyzer's files; an interrupted run continues from it.")
    ] = RESULTS / "model-analyzer",
    config: Annotated[Path, typer.Option(help="Model Analyzer's configuration.")] = (
        ROOT / "tools" / "model_analyzer" / "ensemble.yaml"
    ),
    host: Annotated[str, typer.Option(help="The server's host in mode remote.")] = "localhost",
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    docker_image: Annotated[str | None, typer.Option(help="The server image in mode docker.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two configurations, a few requests; the figures do not count.")
    ] = (False),
    output: Output = RESULTS / "profile.json",
    models: Models = MODELS,
) -> None:
    """Search for the best configuration of the ensemble with the real Model Analyzer."""
    from clip_tools.measuring import profile as verb

    options = verb.ProfileOptions(
        folder=folder,
        mode=mode,
        images=images,
        config=config,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        docker_image=docker_image,
        quick=quick,
        models=models,
    )
    with progress("model-analyzer") as tell:
        result = verb.profile(options, tell=tell)
    finish(result, output)
    if apply:
        apply_best(result, apply, models)
