"""The options of `clip-tools embed-dataset`."""

from typing import Annotated

import typer

from clip_tools.cli.options import progress
from clip_tools.option_types import Models
from clip_tools.paths import MODELS


def embed_dataset(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or a URI that pyarrow reads (s3://, gs://, hdfs:// ...) with image files, WebDataset shards "
            "(.tar) or Parquet files with a column of images; or one such file."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="A folder or URI for the Parquet parts alone.")],
    url: Annotated[
        str, typer.Option(envvar="INFERENCE_SERVICE_URL", help="The server's URL; several, separated by commas.")
    ] = "grpc://localhost:8001",
    local: Annotated[
        bool, typer.Option("--local", help="Run the models in the actors, by ONNX Runtime, without a server.")
    ] = False,
    models: Models = MODELS,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster, as in RAY_ADDRESS; by default one is started on this machine.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="How many parts are embedded at once; by default one for each node.")
    ] = None,
    part_images: Annotated[int, typer.Option(min=1, help="The maximum number of image files in a part.")] = 1000,
    image_column: Annotated[str, typer.Option(help="The column of images in Parquet files.")] = "image",
    timeout_s: Annotated[
        float, typer.Option(min=1, help="How long to wait for a server that is busy or gone.")
    ] = 300.0,
) -> None:
    """Embed a library larger than one machine to Parquet, as a Ray Data job: a row for every image, or a named error.

    A new run continues where the last one stopped. Exit codes: 0 all images embedded, 1 some images or Ray failed,
    2 usage, 3 the server cannot be reached or used.
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
            tell=tell,
        )
    typer.echo(summary(done, destination), err=True)
    if done.failed:
        raise typer.Exit(1)
