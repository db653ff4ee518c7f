"""`clip-tools embed-dataset`, its options."""

from typing import Annotated

import typer

from clip_tools.cli.options import Models, progress
from clip_tools.paths import MODELS


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

    with progress() as tell:
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
