"""The options of `clip-tools verify`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.accuracy.gates import PRECISIONS
from clip_tools.cli.options import one_of, progress
from clip_tools.errors import ToolError
from clip_tools.oracle import ORIENTATIONS
from clip_tools.paths import MODELS


def verify(
    engine: Annotated[
        str | None,
        typer.Option(help="A .onnx or .plan file, or a named configuration to serve for it ('default', 'cpu-bf16')."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server instead of --engine: grpc://host:8001.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of 100 or more images; by default this project's 121 photographs.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Compare the text tower, on this project's 120 texts.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The architecture; by default that of the engine's manifest.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="A tag, a checkpoint's path or random:SEED; by default that of the manifest.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="The precision whose gate applies; by default the engine's.")
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help="ignore or exif, as the server at --url is configured; by default that of the configuration."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the JSON; by default to stdout.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to write a histogram, as PNG.")] = None,
    models: Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")] = MODELS,
) -> None:
    """Compare an engine's embeddings with open_clip's in FP32. Exit 1 below the gate of its precision."""
    import json

    from rich.console import Console

    from clip_tools import photos
    from clip_tools import verify as verb
    from clip_tools.measuring.fingerprint import fingerprint
    from clip_tools.oracle import Weights
    from clip_tools.serving.engine import find_engine

    found = find_engine(engine, url, models)
    given = Weights()
    weights = Weights(model or given.model, pretrained or given.pretrained) if model or pretrained else None
    gate_precision = one_of("--precision", precision, PRECISIONS) if precision else None
    image_orientation = one_of("--orientation", orientation, ORIENTATIONS) if orientation else None
    if text and (images or gate_precision or image_orientation):
        raise ToolError(
            "--text takes no --images, --precision or --orientation: the texts are this project's, the tower is FP32",
            exit_code=2,
        )
    with progress("reading the images") as tell:
        if text:
            verdict = verb.verify_text(found, weights, tell=tell)
        else:
            paths = photos.images_in(images) if images else photos.gate_photos()
            verdict = verb.verify(
                found, weights, paths, precision=gate_precision, orientation=image_orientation, tell=tell
            )
    Console(stderr=True).print(verb.verdict_table(verdict))
    result = json.dumps({"kind": "verify", "environment": fingerprint(), **verdict.to_dict()}, indent=2)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(result + "\n")
    else:
        typer.echo(result)
    if picture:
        verb.draw_histogram(verdict, picture)
    if verdict.counts_for_nothing:
        sys.stderr.write(f"this counts for nothing: {verdict.counts_for_nothing}\n")
    if not verdict.passed:
        raise ToolError(f"{verdict.engine} is under the gate of {verdict.gate_name}: {'; '.join(verdict.failures)}")
