"""The verbs of `clip-tools` that make an engine and prove it; `clip_tools.cli` takes them in."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from clip_tools.engines.build_engine import PLAN_PATH, default_onnx
from clip_tools.engines.gates import PRECISIONS
from clip_tools.engines.precision import Precision
from clip_tools.engines.tensorrt_library import RUNTIMES, Runtime
from clip_tools.errors import ToolError
from clip_tools.oracle import ORIENTATIONS, Orientation
from clip_tools.paths import MODELS, RESULTS

app = typer.Typer()

Architecture = Annotated[str, typer.Option(help="An open_clip architecture.", envvar="CLIP_MODEL")]
PrecisionName = Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]


@app.command("export-onnx")
def export_onnx(
    model: Architecture = "ViT-B-32",
    pretrained: Annotated[
        str,
        typer.Option(
            help="A pretrained tag, a checkpoint's path, or random:SEED for untrained weights.",
            envvar="CLIP_CHECKPOINT",
        ),
    ] = "laion2b_s34b_b79k",
    precision: PrecisionName = "fp32",
    image: Annotated[bool, typer.Option("--image", help="The image tower alone.")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="The text tower alone, with its tokenizer's merges; in FP32.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the model goes, its manifest beside it; by default model.onnx or model.PRECISION.onnx of "
            "clip_onnx, model.onnx of clip_text_onnx. The image tower alone, unless --text."
        ),
    ] = None,
    photographs: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images to compare on, in place of our own photographs (fp32: 10, else 121). The first "
            "ten are kept beside the model, in sample.npz: servers are held to open_clip's vectors of them."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="int8 and fp8: a folder of images like those that will be embedded, 500 or more."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Calibrate on fewer than 100 images.")] = False,
) -> None:
    """Export an open_clip model's image and text tower to ONNX, compare them with PyTorch, and write their manifests.

    A precision other than fp32 is for the image tower alone. stdout has each tower's manifest, the image's first.
    """
    from clip_tools import photos
    from clip_tools.engines import export_onnx as verb
    from clip_tools.engines.calibration import check_count
    from clip_tools.engines.export_text import TEXT_MODEL_PATH, export_text
    from clip_tools.engines.export_variant import export_variant
    from clip_tools.oracle import Weights, load_oracle, load_tokenizer

    weights, wanted = Weights(model, pretrained), checked_precision(precision)
    if text and (wanted != "fp32" or (image and output)):
        raise ToolError("--text: expected without --precision, and with --output without --image", exit_code=2)
    exports_text = text or (wanted == "fp32" and not image and output is None)
    exports_image = image or not text
    if (wanted in ("int8", "fp8")) != (calibration is not None):
        expected = "needs --calibration with a folder of images" if calibration is None else "takes no --calibration"
        raise ToolError(f"--precision {wanted} {expected}", exit_code=2)
    images: list[Path] = []
    if calibration is not None:
        images = photos.images_in(calibration)
        if note := check_count(len(images), force=force):
            sys.stderr.write(f"{note}\n")
    manifests = []
    with progress(f"exporting {model}, {pretrained}") as advance:
        if exports_text:
            load_tokenizer(model)  # one that is refused, before anything is written
        oracle = load_oracle(weights) if wanted == "fp32" else None
        ours = photos.demo_photos if wanted == "fp32" else photos.gate_photos
        paths = photos.images_in(photographs) if photographs else ours()
        if exports_image and wanted == "fp32":
            files = [path.read_bytes() for path in paths]
            manifests.append(verb.export_onnx(weights, files, output or verb.MODEL_PATH, oracle=oracle))
        elif exports_image:
            target = output or default_onnx(wanted)
            manifests.append(export_variant(weights, wanted, paths, target, calibration=images, advance=advance))
        if exports_text:
            manifests.append(export_text(weights, output or TEXT_MODEL_PATH, oracle=oracle))
    if reason := manifests[0].gate.get("counts_for_nothing"):
        sys.stderr.write(f"its gate counts for nothing: {reason}\n")
    if not manifests[0].trained:
        sys.stderr.write("untrained weights: good for trying things out, worth nothing as embeddings\n")
    for manifest in manifests:
        typer.echo(manifest.to_json())


@app.command("build-engine")
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

    from clip_tools.engines import build_engine as verb

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


@app.command()
def verify(
    engine: Annotated[
        str | None,
        typer.Option(help="A .onnx or .plan file, or a named configuration to serve for it ('default', 'cpu-bf16')."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server in place of --engine: grpc://host:8001.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of 100 or more images; by default 121 photographs of ours.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="The text tower, on 120 texts of ours, in place of images.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="The architecture; by default the engine's manifest's.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="A tag, a checkpoint's path or random:SEED; by default the manifest's.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Whose gate it is held to; by default the engine's own precision.")
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(help="ignore or exif, as the server behind --url has it; by default the configuration's."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes, in place of stdout.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where a histogram goes, as PNG.")] = None,
    models: Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")] = MODELS,
) -> None:
    """Hold an engine against open_clip in FP32; exit 1 when it is under the gate of its precision."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from clip_tools import photos
    from clip_tools.engines import verify as verb
    from clip_tools.engines.engine import find_engine
    from clip_tools.measuring.fingerprint import fingerprint
    from clip_tools.oracle import Weights

    found = find_engine(engine, url, models)
    given = Weights()
    weights = Weights(model or given.model, pretrained or given.pretrained) if model or pretrained else None
    held_to = checked_precision(precision) if precision else None
    turned = checked_orientation(orientation) if orientation else None
    if text and (images or held_to or turned):
        raise ToolError(
            "--text takes neither --images, --precision nor --orientation: its texts are ours, its tower is FP32",
            exit_code=2,
        )
    with progress("reading the images") as advance:
        if text:
            verdict = verb.verify_text(found, weights, advance=advance)
        else:
            paths = photos.images_in(images) if images else photos.gate_photos()
            verdict = verb.verify(found, weights, paths, precision=held_to, orientation=turned, advance=advance)
    Console(stderr=True).print(verb.verdict_table(verdict))
    result = json.dumps({"kind": "verify", "environment": asdict(fingerprint()), **verdict.to_dict()}, indent=2)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(result + "\n")
    else:
        typer.echo(result)
    if picture:
        verb.draw_histogram(verdict, picture)
    if verdict.counts_for_nothing:
        sys.stderr.write(f"this counts for nothing: {verdict.counts_for_nothing}\n")
    if not verdict.passed:
        raise ToolError(f"{verdict.engine} is under the gate of {verdict.gate_name}: {'; '.join(verdict.failures)}")


@app.command("tune-precision")
def tune_precision(
    model: Architecture = "ViT-B-32",
    pretrained: Annotated[
        str, typer.Option(help="The weights of the graph: a tag or a checkpoint's path.", envvar="CLIP_CHECKPOINT")
    ] = "laion2b_s34b_b79k",
    onnx: Annotated[
        Path | None, typer.Option(help="Its FP32 graph; by default what export-onnx wrote for clip_onnx.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of 100 or more images; by default 121 photographs of ours.")
    ] = None,
    worst_cosine: Annotated[float, typer.Option(min=0, max=1, help="The gate: the least worst cosine.")] = 0.999,
    rounds: Annotated[int, typer.Option(min=1, help="How often each mix and FP32 are timed, in turn.")] = 15,
    apply: Annotated[
        str | None, typer.Option(help="Write the best mix as the named configuration NAME, and its parts.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes, its curve beside it as SVG.")] = (
        RESULTS / "tune-precision.json"
    ),
    models: Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")] = MODELS,
) -> None:
    """Find the fastest mix of FP32 and BF16 layers on this CPU whose worst cosine to open_clip stays above the gate."""
    from dataclasses import asdict

    from clip_tools import photos
    from clip_tools.engines import mix
    from clip_tools.engines import tune_precision as verb
    from clip_tools.engines.reference import reference
    from clip_tools.measuring import plots, results
    from clip_tools.measuring.fingerprint import fingerprint
    from clip_tools.measuring.precision_section import precision_section
    from clip_tools.oracle import Weights

    if apply:
        mix.check_name(apply, models)
    weights, graph = Weights(model, pretrained), onnx or models / "clip_onnx" / "1" / "model.onnx"
    environment = asdict(fingerprint())
    with progress("open_clip in FP32") as advance:
        expected = reference(weights, photos.images_in(images) if images else photos.gate_photos())
        tuning, found = verb.tune_precision(
            graph, weights, expected, worst_cosine=worst_cosine, rounds=rounds, advance=advance
        )
    result = {"kind": found.pop("kind"), "environment": environment, **found}
    results.write(result, output)
    output.with_suffix(".svg").write_text(plots.speed_against_fidelity(result))
    typer.echo(precision_section(output.stem, result).text)
    if not apply:
        return
    if result["counts_for_nothing"]:
        raise ToolError(f"--apply {apply}: nothing was written: {result['counts_for_nothing']}")
    if tuning.best is None:
        raise ToolError(f"--apply {apply}: nothing was written: no mix inside the gate is {verb.WORTH:g} times FP32")
    for path in mix.apply(tuning.best, graph, weights, apply, mix.comment_of(result, tuning.best), models):
        sys.stderr.write(f"written: {path}\n")
    sys.stderr.write(f"serve it with --model-config-name={apply}\n")


def checked_precision(name: str) -> Precision:
    """The precision of this name. Raises ToolError for another."""
    for precision in PRECISIONS:
        if precision == name:
            return precision
    raise ToolError(f"--precision {name}: expected one of {', '.join(PRECISIONS)}", exit_code=2)


def checked_orientation(name: str) -> Orientation:
    """The orientation of this name. Raises ToolError for another."""
    for orientation in ORIENTATIONS:
        if orientation == name:
            return orientation
    raise ToolError(f"--orientation {name}: expected one of {', '.join(ORIENTATIONS)}", exit_code=2)


def checked_runtime(name: str) -> Runtime:
    """The runtime of this name. Raises ToolError for another."""
    for runtime in RUNTIMES:
        if runtime == name:
            return runtime
    raise ToolError(f"--runtime {name}: expected one of {', '.join(RUNTIMES)}", exit_code=2)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr, where it is a terminal, what is being done: `title` at first, then what `advance` is told."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        tasks: dict[str, Any] = {}
        first = shown.add_task(title, total=None)

        def advance(what: str, done: int, total: int) -> None:
            shown.update(first, visible=False)
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield advance
