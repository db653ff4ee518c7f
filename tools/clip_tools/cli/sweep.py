"""`clip-tools sweep`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Images, Models, tell_applied
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, RESULTS


def sweep(
    axes: Annotated[str, typer.Option(help="What to vary, in this order.")] = (
        "preprocess_instances,engine,max_batch,queue_delay_us"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    images: Images = "640x480",
    window_ms: Annotated[int, typer.Option(min=100, help="perf_analyzer's window.")] = 5000,
    stability_percent: Annotated[int, typer.Option(min=1, help="How far three windows may differ.")] = 10,
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="The configuration to start from, such as cpu-bf16.")
    ] = None,
    also: Annotated[
        Path | None, typer.Option(help="A result of clip-tools profile, whose best is measured here too.")
    ] = None,
    apply: Annotated[
        str | None, typer.Option(help="Write the winner as configs/NAME.pbtxt of the models that it changes.")
    ] = None,
    log: Annotated[Path, typer.Option(help="Each point, a line of JSON; a run goes on from here.")] = (
        RESULTS / "sweep.jsonl"
    ),
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "sweep.json",
    models: Models = MODELS,
) -> None:
    """Search batch limit, queue delay, instances and threads with perf_analyzer: a cross-check of Model Analyzer."""
    from rich.console import Console

    from clip_tools.measuring import results, sections
    from clip_tools.measuring import sweep as verb
    from clip_tools.measuring.variants import committed_variant

    try:
        chosen = verb.axes_of([axis.strip() for axis in axes.split(",") if axis.strip()])
    except KeyError as error:
        raise ToolError(f"--axes {error}: expected some of {', '.join(verb.AXES)}", exit_code=2) from error
    start = committed_variant(models, config_name)
    rival = verb.variant_of(results.read(also)["best"], start) if also else None
    options = verb.SweepOptions(
        axes=chosen,
        images=images,
        concurrency=concurrency,
        window_ms=window_ms,
        stability_percent=stability_percent,
        config_name=config_name,
        also=(rival,) if rival else (),
        models=models,
        log=log,
    )
    with Console(stderr=True).status("sweep") as status:
        result = verb.sweep(options, tell=lambda line: status.update(f"sweep: {line}"))
    results.write(result, output)
    typer.echo(sections.tuning_section(output.stem, result).text)
    if apply:
        tell_applied(verb.apply(result, apply, models), apply)
