"""The options of `clip-tools tune-precision`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Architecture, Output, finish, progress
from clip_tools.errors import ToolError
from clip_tools.option_types import Models
from clip_tools.paths import MODELS, RESULTS


def tune_precision(
    model: Architecture = "ViT-B-32",
    pretrained: Annotated[
        str, typer.Option(help="The weights of the graph: a tag or a checkpoint's path.", envvar="CLIP_CHECKPOINT")
    ] = "laion2b_s34b_b79k",
    onnx: Annotated[
        Path | None, typer.Option(help="The FP32 graph; by default the one that export-onnx wrote for clip_onnx.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of 100 or more images; by default this project's 121 photographs.")
    ] = None,
    worst_cosine: Annotated[
        float, typer.Option(min=0, max=1, help="The gate: the lowest worst cosine that passes.")
    ] = 0.999,
    rounds: Annotated[int, typer.Option(min=1, help="How often to time each mix and FP32, in turns.")] = 15,
    apply: Annotated[
        str | None, typer.Option(help="Write the best mix as the named configuration NAME, and its parts.")
    ] = None,
    output: Output = RESULTS / "tune-precision.json",
    models: Models = MODELS,
) -> None:
    """Find the fastest mix of FP32 and BF16 layers on this CPU whose worst cosine to open_clip passes the gate."""
    from clip_tools import photos
    from clip_tools.accuracy.reference import reference
    from clip_tools.export import mix
    from clip_tools.export import tune_precision as verb
    from clip_tools.measuring.results import begin
    from clip_tools.oracle import Weights

    mix.check_machine()
    if apply:
        mix.check_name(apply, models)
    weights, graph = Weights(model, pretrained), onnx or models / "clip_onnx" / "1" / "model.onnx"
    result = begin("tune-precision")
    with progress("open_clip in FP32") as tell:
        expected = reference(weights, photos.images_in(images) if images else photos.gate_photos())
        tuning, found = verb.tune_precision(
            graph, weights, expected, worst_cosine=worst_cosine, rounds=rounds, tell=tell
        )
    result |= found
    finish(result, output)
    if not apply:
        return
    if result["counts_for_nothing"]:
        raise ToolError(f"--apply {apply}: nothing was written: {result['counts_for_nothing']}")
    if tuning.best is None:
        raise ToolError(
            f"--apply {apply}: nothing was written: no mix that passes the gate is {verb.WORTH:g} times as fast as FP32"
        )
    for path in mix.apply(tuning.best, graph, weights, apply, mix.comment_of(result, tuning.best), models):
        sys.stderr.write(f"written: {path}\n")
    sys.stderr.write(f"serve it with --model-config-name={apply}\n")
