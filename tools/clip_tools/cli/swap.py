"""The options of `clip-tools swap`."""

from typing import Annotated

import typer

from clip_tools.cli.options import CheckVectors
from clip_tools.option_types import Models
from clip_tools.paths import MODELS


def swap(
    name: Annotated[str, typer.Argument(help="A named configuration of the deployment: onnx, trt, cpu-bf16 ...")],
    url: Annotated[str, typer.Option(help="The running server's gRPC URL.")] = "grpc://localhost:8001",
    models: Models = MODELS,
    settle_s: Annotated[
        float, typer.Option(min=0.1, help="How long the old model must be idle before it is unloaded.")
    ] = 2.0,
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Allow a target with other weights, and so other vectors.")
    ] = False,
    check_vectors: CheckVectors = True,
) -> None:
    """Move a running server to another engine without losing a request; if a step fails, undo all.

    A server of another user or machine requires its key in CLIP_ADMIN_KEY.
    """
    from clip_tools.serving import swap as verb
    from clip_tools.serving.model_control import GrpcModelControl
    from clip_tools.serving.swap_steps import SwapOptions

    options = SwapOptions(
        name,
        models=models,
        settle_s=settle_s,
        allow_other_weights=allow_other_weights,
        check_vectors=check_vectors,
    )
    verb.check_deployment(url, options)
    with GrpcModelControl(url) as control:
        verb.swap(control, options, say=lambda line: typer.echo(line, err=True))
