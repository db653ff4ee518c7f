"""`clip-tools build-engine`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import checked_precision, checked_runtime
from clip_tools.tensorrt.build_engine import PLAN_PATH, default_onnx
from clip_tools.tensorrt.library import RUNTIMES


def build_engine(
    runtime: Annotated[str, typer.Option(help=f"{' or '.join(RUNTIMES)}; the latter builds without a GPU.")] = (
        "tensorrt"
    ),
    precision: Annotated[str, typer.Option(help="What the matrices must run in; another is refused.")] = "fp16",
    onnx: Annotated[
        Path | None, typer.Option(help="The graph; by default what export-onnx --precision PRECISION wrote.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the plan goes; its manifest goes beside it.")] = PLAN_PATH,
    min_batch: Annotated[int, typer.Option(min=1, help="The smallest batch of the profile.")] = 1,
    opt_batch: Annotated[int, typer.Option(min=1, help="The batch that it is tuned for.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="The largest batch.")] = 64,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Scratch memory that a layer may take; by default the whole GPU.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for later versions of the same major version.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: also for other GPUs from Ampere on.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: a compute capability such as 8.9; may be given again. By default all."),
    ] = None,
) -> None:
    """Build a TensorRT plan of the exported graph, and fail when its matrices run in another precision than asked."""
    from rich.console import Console

    from clip_tools.tensorrt import build_engine as verb

    wanted = checked_precision(precision)
    options = verb.EngineOptions(
        runtime=checked_runtime(runtime),
        precision=wanted,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        workspace_mib=workspace_mib,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        targets=tuple(target or ()),
    )
    manifest = verb.build_engine(onnx or default_onnx(wanted), output, options)
    Console(stderr=True).print(verb.census_table(manifest))
    typer.echo(manifest.to_json())
