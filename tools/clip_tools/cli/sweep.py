"""The options of `clip-tools sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import (
    Apply,
    ConfigName,
    Images,
    Models,
    Output,
    Stability,
    Window,
    apply_best,
    finish,
    progress,
)
from clip_tools.paths import MODELS, RESULTS


def sweep(
    axes: Annotated[str, typer.Option(help="What to vary, in this order.")] = (
        "preprocess_instances,engine,max_batch,queue_delay_us"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    images: Images = "640x480",
    window_ms: Window = 5000,
    stability_percent: Stability = 10,
    config_name: ConfigName = None,
    also: Annotated[
        Path | None, typer.Option(help="A result of clip-tools profile; its best setting is measured too.")
    ] = None,
    apply: Apply = None,
    log: Annotated[
        Path, typer.Option(help="The log of points, one JSON per line; an interrupted run continues from it.")
    ] = RESULTS / "sweep.jsonl",
    output: Output = RESULTS / "sweep.json",
    models: Models = MODELS,
) -> None:
    """Search for the best batch limit, queue delay, instances and threads with perf_analyzer; checks Model Analyzer."""
    from clip_tools.measuring import sweep as verb
    from clip_tools.measuring.results import read

    options = verb.SweepOptions(
        axes=[axis.strip() for axis in axes.split(",") if axis.strip()],
        images=images,
        concurrency=concurrency,
        window_ms=window_ms,
        stability_percent=stability_percent,
        config_name=config_name,
        also=read(also)["best"] if also else "",
        models=models,
        log=log,
    )
    with progress("sweep") as tell:
        result = verb.sweep(options, tell=tell)
    finish(result, output)
    if apply:
        apply_best(result, apply, models)
