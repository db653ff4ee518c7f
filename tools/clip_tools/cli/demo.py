"""The options of `clip-tools demo`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import CheckVectors
from clip_tools.option_types import ConfigName, Models, Port
from clip_tools.paths import MODELS


def demo(
    models: Models = MODELS,
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    config_name: ConfigName = None,
    check_vectors: CheckVectors = True,
    picture: Annotated[Path | None, typer.Option(help="The file for the heat map.")] = None,
) -> None:
    """Serve, embed the demo photographs over gRPC, show their similarities, and stop."""
    from clip_tools import demo as verb
    from clip_tools.serving.serve_options import ServeOptions

    verb.demo(
        ServeOptions(
            models=models,
            config_name=config_name,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            log=verb.LOG,
            check_vectors=check_vectors,
        ),
        picture=picture or verb.PICTURE,
    )
