"""`clip-tools profile`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Images, Models, tell_applied
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, RESULTS, ROOT


def profile(
    mode: Annotated[str, typer.Option(help="local (the embedded server), docker, or remote (a running server).")] = (
        "local"
    ),
    apply: Annotated[
        str | None, typer.Option(help="Write the winner as configs/NAME.pbtxt of the models that it changes.")
    ] = None,
    images: Images = "640x480",
    folder: Annotated[Path, typer.Option(help="All that Model Analyzer writes; a run goes on from here.")] = (
        RESULTS / "model-analyzer"
    ),
    config: Annotated[Path, typer.Option(help="Model Analyzer's configuration.")] = (
        ROOT / "tools" / "model_analyzer" / "ensemble.yaml"
    ),
    host: Annotated[str, typer.Option(help="Of the server in mode remote.")] = "localhost",
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
    docker_image: Annotated[str | None, typer.Option(help="The server image in mode docker.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two configurations, a few requests; no figure counts.")] = (
        False
    ),
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "profile.json",
    models: Models = MODELS,
) -> None:
    """Search the ensemble's best configuration with the real Model Analyzer."""
    from rich.console import Console

    from clip_tools.measuring import profile as verb
    from clip_tools.measuring import results, sections

    if mode not in verb.MODES:
        raise ToolError(f"--mode {mode}: expected {', '.join(verb.MODES)}", exit_code=2)
    options = verb.ProfileOptions(
        folder=folder,
        mode=mode,  # type: ignore[arg-type]
        images=images,
        config=config,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        docker_image=docker_image,
        quick=quick,
        models=models,
    )
    with Console(stderr=True).status("model-analyzer") as status:
        result = verb.profile(options, tell=lambda line: status.update(f"model-analyzer: {line}"))
    results.write(result, output)
    typer.echo(sections.tuning_section(output.stem, result).text)
    if apply:
        tell_applied(verb.apply(result, apply, folder / "repository", models), apply)
