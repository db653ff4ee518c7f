"""`clip-tools allow_extra_args`, its options."""

import os
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import CheckVectors, ConfigName, Models, Port
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS
from clip_tools.serving.access import OPEN_METADATA_VARIABLE
from clip_tools.serving.machine import INSTANCES


def serve(
    context: typer.Context,
    config_name: ConfigName = None,
    models: Models = MODELS,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines reach the server.")
    ] = "127.0.0.1",
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    ready_timeout_s: Annotated[float, typer.Option(help="How long loading may take.")] = 180.0,
    rebuild_stale: Annotated[
        bool, typer.Option("--rebuild-stale", help="Build a TensorRT plan again that does not fit what is here.")
    ] = False,
    check_vectors: CheckVectors = True,
    preprocess_instances: Annotated[
        int | None,
        typer.Option(min=1, envvar=INSTANCES, help="Processes that decode images; without it by the machine's cores."),
    ] = None,
    open_metadata: Annotated[
        bool | None,
        typer.Option(
            "--open-metadata/--closed-metadata",
            envvar=OPEN_METADATA_VARIABLE,
            help="Metadata and statistics need no key; by default where --host is this machine.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The server's certificate, PEM: gRPC is encrypted, HTTP for this machine alone.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of this authority, PEM.")
    ] = None,
) -> None:
    """Serve clip_ensemble by the embedded tritonserver until Ctrl-C. Further flags go to tritonserver.

    Whoever reaches it can embed and ask whether it is ready, and on this machine read what perf_analyzer reads:
    metadata and statistics. The rest needs the key of CLIP_ADMIN_KEY; without one, a
    key of this run, which this user's `clip-tools` finds by itself. With CLIP_API_KEY embedding needs that one too, or
    with CLIP_HTTP_KEY that one over HTTP alone.
    """
    from clip_tools.serving import serve as verb
    from clip_tools.serving.access import Access, Tls

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and tls_cert is None):
        raise ToolError("--tls-cert and --tls-key go together, and --tls-client-ca with them", exit_code=2)
    tls = Tls(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    verb.serve(
        verb.ServeOptions(
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
