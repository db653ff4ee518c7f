"""The options of `clip-tools perf`."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import ConfigName, Images, Models, Output, Stability, Window, finish, numbers, progress
from clip_tools.paths import MODELS, RESULTS


def perf(
    model: Annotated[str, typer.Option(help="clip_ensemble, or a step: preprocess, clip_onnx, clip_trt.")] = (
        "clip_ensemble"
    ),
    images: Images = "640x480",
    url: Annotated[str, typer.Option(help="The running server, HOST:PORT.")] = "localhost:8001",
    serve: Annotated[bool, typer.Option("--serve", help="Start the embedded server for the run.")] = False,
    config_name: ConfigName = None,
    protocol: Annotated[str, typer.Option(help="grpc or http.")] = "grpc",
    concurrency: Annotated[
        str, typer.Option(help="The numbers of requests in flight to measure; empty for none.")
    ] = "1,4,16",
    request_rate: Annotated[str, typer.Option(help="The requests per second to measure; empty for none.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per request.")] = 1,
    window_ms: Window = 5000,
    max_trials: Annotated[
        int, typer.Option(min=1, help="The maximum number of windows; three that agree are enough.")
    ] = 10,
    stability_percent: Stability = 10,
    output: Output = RESULTS / "perf.json",
    write_input: Annotated[
        Path | None,
        typer.Option(
            help="Only write perf_analyzer's input JSON to this file. docs/container.md shows how to run perf_analyzer "
            "with it from another machine."
        ),
    ] = None,
    models: Models = MODELS,
) -> None:
    """Run the real perf_analyzer against a running server, with many different photographs.

    Prints the levels as JSON on stdout and as a table on stderr.
    """
    import json

    from clip_tools.measuring import perf as verb
    from clip_tools.measuring.services import triton_service
    from clip_tools.measuring.variants import Variant

    options = verb.PerfOptions(
        model=model,
        images=images,
        url=url,
        protocol=protocol,
        concurrency=numbers(concurrency),
        request_rate=tuple(map(float, numbers(request_rate))),
        batch=batch,
        window_ms=window_ms,
        max_trials=max_trials,
        stability_percent=stability_percent,
        models=models,
    )
    if write_input:
        count = verb.write_input(options, write_input)
        typer.echo(f"{write_input}: {count} images for --input-data", err=True)
        return
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress("perf_analyzer"))
        if serve:
            served = stack.enter_context(triton_service(Variant(config_name), models))
            address = served.url if protocol == "grpc" else served.http_url
            options = replace(options, url=address.split("://")[1])
        result = verb.perf(options, output.parent, tell=tell)
    finish(result, output, err=True)
    typer.echo(json.dumps(result["levels"]))
