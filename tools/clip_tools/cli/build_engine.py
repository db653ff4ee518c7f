"""The options of `clip-tools build-engine`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.accuracy.gates import PRECISIONS
from clip_tools.cli.options import one_of
from clip_tools.tensorrt.build_engine import PLAN_PATH, default_onnx
from clip_tools.tensorrt.runtime import RUNTIMES


def build_engine(
    runtime: Annotated[str, typer.Option(help=f"{' or '.join(RUNTIMES)}; {RUNTIMES[1]} builds without a GPU.")] = (
        "tensorrt"
    ),
    precision: Annotated[
        str, typer.Option(help="The precision of the matrices; a graph in another one is refused.")
    ] = "fp16",
    onnx: Annotated[
        Path | None, typer.Option(help="The graph; by default the one that export-onnx --precision PRECISION writes.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the plan and its manifest.")] = PLAN_PATH,
    min_batch: Annotated[int, typer.Option(min=1, help="The smallest batch of the profile.")] = 1,
    opt_batch: Annotated[int, typer.Option(min=1, help="The batch size that the plan is tuned for.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="The largest batch.")] = 64,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Scratch memory for a layer; by default the whole GPU.")
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="The plan also runs on later TensorRT versions of the same major version."
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: the plan also runs on other GPUs, from Ampere on.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: a compute capability such as 8.9; repeatable. By default all."),
    ] = None,
) -> None:
    """Build a TensorRT plan from the exported graph. Fails if its matrices run in another precision than requested."""
    from rich.console import Console

    from clip_tools.tensorrt import build_engine as verb

    chosen = one_of("--precision", precision, PRECISIONS)
    options = verb.PlanOptions(
        runtime=one_of("--runtime", runtime, RUNTIMES),
        precision=chosen,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        workspace_mib=workspace_mib,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        targets=tuple(target or ()),
    )
    manifest = verb.build_engine(onnx or default_onnx(chosen), output, options)
    Console(stderr=True).print(verb.census_table(manifest))
    typer.echo(manifest.to_json())
