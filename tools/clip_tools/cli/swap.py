"""`clip-tools swap`, its options."""

from typing import Annotated

import typer

from clip_tools.cli.options import CheckVectors, Models
from clip_tools.paths import MODELS


def swap(
    name: Annotated[str, typer.Argument(help="A named configuration of the whole deployment: onnx, trt, cpu-bf16 ...")],
    url: Annotated[str, typer.Option(help="The running server's gRPC URL.")] = "grpc://localhost:8001",
    models: Models = MODELS,
    settle_s: Annotated[
        float, typer.Option(min=0.1, help="How long the model that is left must have been idle before it is unloaded.")
    ] = 2.0,
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Let the vectors change: the target is another model.")
    ] = False,
    check_vectors: CheckVectors = True,
) -> None:
    """Move a running server to another engine without losing a request; undo everything when a step fails.

    A server of another user or machine is asked with the key of CLIP_ADMIN_KEY.
    """
    from clip_tools.serving import swap as verb
    from clip_tools.serving.model_control import GrpcModelControl

    options = verb.SwapOptions(
        name,
        models=models,
        settle_s=settle_s,
        allow_other_weights=allow_other_weights,
        check_vectors=check_vectors,
    )
    verb.check_deployment(url, options)
    with GrpcModelControl(url) as control:
        verb.swap(control, options, say=lambda line: typer.echo(line, err=True))
