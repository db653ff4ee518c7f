"""`clip-tools onnx-profile`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Models, numbers
from clip_tools.paths import MODELS, RESULTS


def onnx_profile(
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="The configuration whose session is profiled.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of the scaling.")] = "1,2,4,8,16,32,64",
    operator_batch: Annotated[int, typer.Option(min=1, help="The batch that the operators are timed at.")] = 8,
    seconds: Annotated[float, typer.Option(help="For each batch size.")] = 2.0,
    beside: Annotated[
        Path | None, typer.Option(help="Another ONNX file of the same tensors, timed in turn with the served one.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "onnx-profile.json",
    models: Models = MODELS,
) -> None:
    """Where the engine's time goes: session creation, operators, providers of the nodes, scaling by batch."""
    from rich.console import Console

    from clip_tools.measuring import onnx_profile as verb
    from clip_tools.measuring import results, sections

    with Console(stderr=True).status("onnxruntime") as status:
        result = verb.onnx_profile(
            models=models,
            config_name=config_name,
            beside=beside,
            batches=numbers(batches),
            operator_batch=operator_batch,
            seconds=seconds,
            tell=lambda line: status.update(f"onnxruntime: {line}"),
        )
    results.write(result, output)
    verb.explain(result)
    section = sections.onnx_section(output.stem, result)
    for name, picture in section.pictures.items():
        (output.parent / name).write_text(picture)
    typer.echo(section.text)
