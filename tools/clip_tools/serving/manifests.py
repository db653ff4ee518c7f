"""Checks model files against the manifests beside them, before anything loads the files."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.manifest import GRAPH, Manifest, manifest_path
from clip_tools.repository import Model, build_command, engine_of
from clip_tools.serving.engine import manifest_of
from clip_tools.tensorrt.plan_manifest import PlanManifest


def wrong_file(file: Path) -> str | None:
    """Why a file does not match its manifest. None if it matches, or has no manifest."""
    path = manifest_path(file)
    try:
        expected = json.loads(path.read_text())["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{path}: expected the sha256 of {file}, found none"
    if (got := sha256_of(file)) == expected:
        return None
    return f"{file} is not the file that {path.name} describes: expected sha256 {expected}, got {got}"


def check_manifests(
    models: Sequence[Model], say: Callable[[str], object] | None = None, *, backends: Sequence[str] = ("onnxruntime",)
) -> None:
    """Raises ToolError for a file that does not match its manifest.

    Reports files without a manifest, and graphs of an earlier version, which are right but slower. `check_plans` checks
    the manifests of plans.
    """
    tell = say or sys.stderr.write
    for model in models:
        if model.file is None or model.config.backend not in backends:
            continue
        if wrong := wrong_file(model.file):
            raise ToolError(f"{model.name}: {wrong}; it is damaged or was replaced: run `{build_command(model)}` again")
        if not manifest_path(model.file).is_file():
            tell(f"{model.name}: {model.file} has no {manifest_path(model.file).name}, so its sha256 is not checked\n")
        if (made := Manifest.read(model.file)) and made.graph < GRAPH:
            tell(
                f"{model.name}: {model.file} is of an earlier version: `{build_command(model)}` makes a faster one "
                "with the same vectors\n"
            )


def check_plans(models: Sequence[Model], *, rebuild: bool = False) -> None:
    """Raises ToolError for a plan that does not fit this graph, GPU or TensorRT; `rebuild` builds it again instead."""
    from clip_tools.tensorrt.build_engine import build_engine, stale_reason
    from clip_tools.tensorrt.plan_manifest import PlanOptions

    for model in models:
        plan = model.file
        if plan is None or model.config.backend != "tensorrt" or (reason := stale_reason(plan)) is None:
            continue
        if not rebuild:
            raise ToolError(f"{model.name}: {reason}, or run `clip-tools serve --rebuild-stale`")
        sys.stderr.write(f"{model.name}: {reason}; building it now\n")
        manifest = PlanManifest.read(plan)
        options = manifest.options if manifest else PlanOptions()
        onnx = manifest.onnx if manifest else "model.fp16.onnx"
        build_engine(plan.parents[2] / "clip_onnx" / "1" / onnx, plan, options)


def check_towers(images: Sequence[Model], texts: Sequence[Model]) -> None:
    """Raises ToolError if the image and the text deployment have different weights: their vectors do not compare.

    Without both manifests nothing is checked.
    """
    if not texts:
        return
    image, text = engine_of(images), engine_of(texts)
    of_images, of_texts = manifest_of(image.file), manifest_of(text.file)
    if of_images and of_texts and of_images.identity != of_texts.identity:
        raise ToolError(
            f"{image.name} is of {' '.join(of_images.identity)} and {text.name} of {' '.join(of_texts.identity)}: "
            "expected the same weights, or texts and images do not compare. Export both again with `clip-tools "
            f"export-onnx`, or remove {text.file} to serve images alone"
        )
