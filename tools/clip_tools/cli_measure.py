"""The verbs of `clip-tools` that measure; `clip_tools.cli` takes them in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, ROOT

app = typer.Typer()

RESULTS = ROOT / "results"

Models = Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")]
Images = Annotated[
    str, typer.Option(help="640x480 (real photographs of that size), phone (12 MP originals), or a folder of images.")
]


def numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` -> (1, 4, 16). Raises ToolError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ToolError(f"'{text}': expected whole numbers with commas, such as 1,4,16", exit_code=2) from error


def show(table: Any) -> None:
    """A table for people, on stderr, so that stdout holds data alone."""
    from rich.console import Console

    Console(stderr=True).print(table)


@app.command()
def perf(
    model: Annotated[str, typer.Option(help="clip_ensemble, or a step: preprocess, clip_onnx, clip_trt.")] = (
        "clip_ensemble"
    ),
    images: Images = "640x480",
    url: Annotated[str, typer.Option(help="The running server, HOST:PORT.")] = "localhost:8001",
    protocol: Annotated[str, typer.Option(help="grpc or http.")] = "grpc",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, each measured; empty for none.")] = "1,4,16",
    request_rate: Annotated[str, typer.Option(help="Requests a second, each measured; empty for none.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images a request.")] = 1,
    window_ms: Annotated[int, typer.Option(min=100, help="One measurement window.")] = 5000,
    max_trials: Annotated[int, typer.Option(min=1, help="Windows at most; three that agree are enough.")] = 10,
    stability_percent: Annotated[int, typer.Option(min=1, help="How far three windows may differ.")] = 10,
    output: Annotated[Path, typer.Option(help="Where the JSON goes; the picture goes beside it.")] = (
        RESULTS / "perf.json"
    ),
    write_input: Annotated[
        Path | None, typer.Option(help="Only write perf_analyzer's input JSON to this file, and run nothing.")
    ] = None,
    models: Models = MODELS,
) -> None:
    """Run the real perf_analyzer against a running server, with many different photographs."""
    import json

    from rich.console import Console

    from clip_tools import perf as verb

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
    with Console(stderr=True).status("perf_analyzer") as status:
        result = verb.perf(options, output, tell=lambda line: status.update(f"perf_analyzer: {line}"))
    show(verb.table(result))
    verb.explain(result)
    typer.echo(json.dumps(result["levels"]))
