"""The command `clip-tools`: one verb, one module."""

import os
import sys
from pathlib import Path
from typing import Annotated

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS
from clip_tools.serving.access import OPEN_METADATA_VARIABLE
from clip_tools.serving.machine import INSTANCES
from clip_tools.serving.proof import CHECK_VECTORS

try:
    import typer
except ImportError:
    sys.exit("clip-tools: typer is not installed: pip install 'clip-embed[cli]'")

from clip_tools import cli_engine, cli_measure, proxy

app = typer.Typer(
    name="clip-tools",
    help="Build, check, serve and measure the model repository.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_engine.app)
app.add_typer(cli_measure.app)

Port = Annotated[int, typer.Option(min=1, max=65535)]
Models = Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")]
ConfigName = Annotated[
    str | None,
    typer.Option("--model-config-name", help="A named configuration of the whole deployment, such as cpu-bf16."),
]

CheckVectors = Annotated[
    bool,
    typer.Option(
        envvar=CHECK_VECTORS, help="Hold the engine's vectors to open_clip's, on photographs kept by its export."
    ),
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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


@app.command()
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


@app.command()
def demo(
    models: Models = MODELS,
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    config_name: ConfigName = None,
    check_vectors: CheckVectors = True,
    picture: Annotated[Path | None, typer.Option(help="Where the heat map goes.")] = None,
) -> None:
    """Serve, embed the demo photographs over gRPC, show how alike they are, and stop."""
    from clip_tools import demo as verb
    from clip_tools.serving.serve import ServeOptions

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


@app.command()
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


@app.command("embed-dataset")
def embed_dataset(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or a URI that pyarrow reads (s3://, gs://, hdfs:// ...): of image files, WebDataset shards "
            "(.tar), Parquet files with a column of images, or one such file."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="A folder or URI of its own for the Parquet parts.")],
    url: Annotated[
        str, typer.Option(envvar="INFERENCE_SERVICE_URL", help="The server; several with commas between them.")
    ] = "grpc://localhost:8001",
    local: Annotated[
        bool, typer.Option("--local", help="Run the model repository in the actors, on ONNX Runtime; no server.")
    ] = False,
    models: Models = MODELS,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster, as RAY_ADDRESS; by default one is started on this machine.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="How many parts are embedded at once; by default one a node.")
    ] = None,
    part_images: Annotated[int, typer.Option(min=1, help="Image files a part, at most.")] = 1000,
    image_column: Annotated[str, typer.Option(help="The column of Parquet files that has the images.")] = "image",
    timeout_s: Annotated[
        float, typer.Option(min=1, help="How long to wait for a server that refuses or has gone.")
    ] = 300.0,
) -> None:
    """Embed a library larger than one machine to Parquet, as a Ray Data job: a row, or a named error, for every image.

    A run that was stopped goes on where it ended. Exit codes: 0 all good, 1 some images failed or Ray did, 2 usage, 3
    the server cannot be reached or used.
    """
    from clip_tools.embed_dataset import embed_dataset as verb
    from clip_tools.embed_dataset import summary

    with cli_measure.progress() as tell:
        done = verb(
            source,
            destination,
            url=url,
            models=models.absolute() if local else None,
            address=address,
            actors=actors,
            part_images=part_images,
            image_column=image_column,
            timeout_s=timeout_s,
            say=lambda line: typer.echo(line, err=True),
            advance=lambda parts, total: tell("parts", parts, total),
        )
    typer.echo(summary(done, destination), err=True)
    if done.failed:
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and an exit code."""
    proxy.leave_this_machine_out()
    try:
        app()
    except ToolError as error:
        sys.stderr.write(f"clip-tools: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
