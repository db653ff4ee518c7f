"""`clip-tools onnx-profile`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import ConfigName, Models, Output, finish, numbers, progress
from clip_tools.paths import MODELS, RESULTS


def onnx_profile(
    config_name: ConfigName = None,
    batches: Annotated[str, typer.Option(help="The batch sizes that are timed.")] = "1,2,4,8,16,32,64",
    operator_batch: Annotated[int, typer.Option(min=1, help="The batch size at which the operators are timed.")] = 8,
    seconds: Annotated[float, typer.Option(help="For each batch size.")] = 2.0,
    beside: Annotated[
        Path | None, typer.Option(help="Another ONNX file of the same tensors, timed in turn with the served one.")
    ] = None,
    output: Output = RESULTS / "onnx-profile.json",
    models: Models = MODELS,
) -> None:
    """Where the engine's time goes: session creation, operators, providers of the nodes, scaling by batch."""
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
