"""The options of `clip-tools serve`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import CheckVectors
from clip_tools.errors import ToolError
from clip_tools.option_types import ConfigName, Models, Port
from clip_tools.paths import MODELS
from clip_tools.serving.access import OPEN_METADATA_VARIABLE
from clip_tools.serving.machine import INSTANCES_VARIABLE


def serve(
    context: typer.Context,
    config_name: ConfigName = None,
    models: Models = MODELS,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    ready_timeout_s: Annotated[float, typer.Option(help="How long loading may take.")] = 180.0,
    rebuild_stale: Annotated[
        bool,
        typer.Option("--rebuild-stale", help="Rebuild a plan that does not fit this graph, GPU or TensorRT."),
    ] = False,
    check_vectors: CheckVectors = True,
    preprocess_instances: Annotated[
        int | None,
        typer.Option(min=1, envvar=INSTANCES_VARIABLE, help="Processes that decode images; default: by the cores."),
    ] = None,
    open_metadata: Annotated[
        bool | None,
        typer.Option(
            "--open-metadata/--closed-metadata",
            envvar=OPEN_METADATA_VARIABLE,
            help="Whether metadata and statistics require no key; by default only if --host is this machine.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="The server's certificate, PEM. Encrypts gRPC; HTTP stays on this machine."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Require client certificates signed by this authority, PEM.")
    ] = None,
) -> None:
    """Serve clip_ensemble by the embedded tritonserver until Ctrl-C. Further flags go to tritonserver.

    Anyone who can reach the server may embed and check its health. Clients on this machine may also read metadata and
    statistics, which perf_analyzer needs. Everything else requires the admin key: CLIP_ADMIN_KEY, or a random key that
    this user's `clip-tools` reads from a key file. With CLIP_API_KEY embedding requires that key, with CLIP_HTTP_KEY
    embedding over HTTP requires that one.
    """
    from clip_tools.serving.access import Access, Tls
    from clip_tools.serving.serve import serve as run
    from clip_tools.serving.serve_options import ServeOptions

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and tls_cert is None):
        raise ToolError("--tls-cert and --tls-key require each other, and --tls-client-ca requires both", exit_code=2)
    tls = Tls(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    run(
        ServeOptions(
            models=models,
            config_name=config_name,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            ready_timeout_s=ready_timeout_s,
            arguments=tuple(context.args),
            rebuild_stale=rebuild_stale,
            check_vectors=check_vectors,
            preprocess_instances=preprocess_instances,
            access=Access.from_environment(os.environ, tls),
            open_metadata=open_metadata,
        )
    )
