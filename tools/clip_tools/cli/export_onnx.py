"""The options of `clip-tools export-onnx`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clip_tools.accuracy.gates import PRECISIONS
from clip_tools.cli.options import Architecture, PrecisionName, one_of, progress
from clip_tools.errors import ToolError
from clip_tools.tensorrt.build_engine import default_onnx


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
    image: Annotated[bool, typer.Option("--image", help="Export the image tower only.")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Export the text tower only, in FP32, with its tokenizer's merges.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the model and its manifest; by default model.onnx or model.PRECISION.onnx of "
            "clip_onnx, and model.onnx of clip_text_onnx. Writes the image tower only, unless --text."
        ),
    ] = None,
    photographs: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images to compare on, instead of this project's photographs (10 for fp32, else 121). The "
            "first ten go to sample.npz beside the model: servers verify their vectors on them."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="For int8 and fp8: a folder of 500 or more images like those you will embed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Calibrate on fewer than 100 images.")] = False,
) -> None:
    """Export an open_clip model's image and text tower to ONNX, compare them with PyTorch, and write their manifests.

    Precisions other than fp32 are for the image tower only. Prints the manifests as JSON, the image tower's first.
    """
    from clip_tools import photos
    from clip_tools.export import export_onnx as verb
    from clip_tools.export.export_text import TEXT_MODEL_PATH, export_text
    from clip_tools.oracle import Weights, load_oracle, load_tokenizer
    from clip_tools.quantization.calibration import check_count
    from clip_tools.quantization.lower_precision import export_lower_precision

    weights, chosen = Weights(model, pretrained), one_of("--precision", precision, PRECISIONS)
    if text and (chosen != "fp32" or (image and output)):
        raise ToolError("--text: expected without --precision, and with --output without --image", exit_code=2)
    exports_text = text or (chosen == "fp32" and not image and output is None)
    exports_image = image or not text
    if (chosen in ("int8", "fp8")) != (calibration is not None):
        expected = "needs --calibration with a folder of images" if calibration is None else "takes no --calibration"
        raise ToolError(f"--precision {chosen} {expected}", exit_code=2)
    images: list[Path] = []
    if calibration is not None:
        images = photos.images_in(calibration)
        if note := check_count(len(images), force=force):
            sys.stderr.write(f"{note}\n")
    manifests = []
    with progress(f"exporting {model}, {pretrained}") as tell:
        if exports_text:
            load_tokenizer(model)  # refuses an unsupported one before anything is written
        oracle = load_oracle(weights) if chosen == "fp32" else None
        ours = photos.demo_photos if chosen == "fp32" else photos.gate_photos
        paths = photos.images_in(photographs) if photographs else ours()
        if exports_image and chosen == "fp32":
            files = [path.read_bytes() for path in paths]
            manifests.append(verb.export_onnx(weights, files, output or verb.MODEL_PATH, oracle=oracle))
        elif exports_image:
            target = output or default_onnx(chosen)
            manifests.append(export_lower_precision(weights, chosen, paths, target, calibration=images, tell=tell))
        if exports_text:
            manifests.append(export_text(weights, output or TEXT_MODEL_PATH, oracle=oracle))
    if reason := manifests[0].gate.get("counts_for_nothing"):
        sys.stderr.write(f"its gate counts for nothing: {reason}\n")
    if not manifests[0].trained:
        sys.stderr.write("untrained weights: for trying things out; the embeddings mean nothing\n")
    for manifest in manifests:
        typer.echo(manifest.to_json())
