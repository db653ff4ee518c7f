"""The options of `clip-tools onnx-profile`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import ConfigName, Models, Output, finish, numbers, progress
from clip_tools.paths import MODELS, RESULTS


def onnx_profile(
    config_name: ConfigName = None,
    batches: Annotated[str, typer.Option(help="The batch sizes to time.")] = "1,2,4,8,16,32,64",
    operator_batch: Annotated[int, typer.Option(min=1, help="The batch size for timing the operators.")] = 8,
    seconds: Annotated[float, typer.Option(help="How long to time each batch size.")] = 2.0,
    beside: Annotated[
        Path | None,
        typer.Option(help="Another ONNX file with the same inputs and outputs, timed in turns with the served one."),
    ] = None,
    output: Output = RESULTS / "onnx-profile.json",
    models: Models = MODELS,
) -> None:
    """Show where the engine spends its time: session creation, operators, execution providers, scaling by batch."""
    from clip_tools.measuring import onnx_profile as verb

    with progress("onnxruntime") as tell:
        result = verb.onnx_profile(
            models=models,
            config_name=config_name,
            beside=beside,
            batches=numbers(batches),
            operator_batch=operator_batch,
            seconds=seconds,
            tell=tell,
        )
    finish(result, output)
