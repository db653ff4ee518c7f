"""Whether a model's file is the one that the manifest beside it describes: asked before anything loads it."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from clip_tools.digest import files_of, sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.manifest import GRAPH, Manifest, manifest_path
from clip_tools.repository import Model, build_command
from clip_tools.serving.told import manifest_of


def wrong_file(file: Path) -> str | None:
    """What is wrong with a file and its manifest; None when they are of each other, or there is no manifest."""
    path = manifest_path(file)
    try:
        expected = json.loads(path.read_text())["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{path} was expected to hold the sha256 of {file}, and does not"
    status = [part.stat() for part in files_of(file)]
    seen = (number for one in status for number in (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns))
    if (got := _sum_of(file, *seen)) == expected:
        return None
    return f"{file} is not the file that {path.name} describes: expected sha256 {expected}, came {got}"


@lru_cache(maxsize=16)
def _sum_of(file: Path, *_status: int) -> str:
    """Read once while it stays as it is: it takes a second, for which a server that died is not replaced."""
    return sha256_of(file)


def check_manifests(
    models: Sequence[Model], say: Callable[[str], object] | None = None, *, backends: Sequence[str] = ("onnxruntime",)
) -> None:
    """Raises ToolError for a file that is not its manifest's, with what to do; says, on stderr, which have none.

    And which are of an earlier version's form: they are right, and slower than they could be.
    A plan's manifest `serve.check_plans` looks at, with what else a plan must fit.
    """
    tell = say or sys.stderr.write
    for model in models:
        if model.file is None or model.config.backend not in backends:
            continue
        if wrong := wrong_file(model.file):
            raise ToolError(
                f"{model.name}: {wrong}; it is damaged or was exchanged: make it again with `{build_command(model)}`"
            )
        if not manifest_path(model.file).is_file():
            tell(f"{model.name}: {model.file} has no {manifest_path(model.file).name}, so its sha256 is not checked\n")
        if (made := Manifest.read(model.file)) and made.graph < GRAPH:
            tell(
                f"{model.name}: {model.file} is an earlier version's: `{build_command(model)}` makes a faster one that "
                "gives the same vectors\n"
            )


def check_towers(images: Sequence[Model], texts: Sequence[Model]) -> None:
    """Raises ToolError for an image and a text tower of different weights, whose vectors have nothing in common.

    Both are deployments. Where a manifest is missing nothing is known, and nothing is refused.
    """
    if not texts:
        return
    (image, of_images), (text, of_texts) = ((models[-2], _made_of(models[-2].file)) for models in (images, texts))
    if of_images and of_texts and of_images != of_texts:
        raise ToolError(
            f"{image.name} is of {' '.join(of_images)} and {text.name} of {' '.join(of_texts)}: expected the same "
            "weights, for else no text is near any image. Export both again with `clip-tools export-onnx`, or remove "
            f"{text.file} to serve images alone"
        )


def _made_of(file: Path | None) -> tuple[str, str] | None:
    """The architecture and the weights of an engine; None where they are not known."""
    made = manifest_of(file) if file else None
    return (made.model, made.checkpoint_sha256 or made.pretrained) if made else None
