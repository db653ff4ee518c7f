"""What a server tells its clients of itself, in the parameters of the ensemble's configuration.

Clients keep it with the vectors, so that those of different weights do not get into one index.
"""

from collections.abc import Sequence
from pathlib import Path

from clip_embed.served import CHECKPOINT, MODEL, PREPROCESS, SUFFIXES
from clip_tools.errors import missing_extra
from clip_tools.export.manifest import Manifest
from clip_tools.oracle import open_heif_too
from clip_tools.repository import ENSEMBLE, Model, deployment
from clip_tools.tensorrt.engine_manifest import EngineManifest


def tell(models: Sequence[Model]) -> None:
    """Write it into the configuration of a deployment's ensemble, its last model; nothing of what is not known."""
    parameters = models[-1].config.parameters
    found = {**_weights(models), **_preprocessing(models)}
    for name in (MODEL, CHECKPOINT, PREPROCESS, SUFFIXES):
        parameters.pop(name, None)
        if found.get(name):
            parameters[name].string_value = found[name]


def write_told(folder: Path, config_name: str | None) -> None:
    """The same in the repository that is served, for the configuration that it starts with."""
    from google.protobuf import text_format

    models = deployment(folder, config_name)
    tell(models)
    named = folder / ENSEMBLE / "configs" / f"{config_name}.pbtxt"
    path = named if config_name and named.is_file() else folder / ENSEMBLE / "config.pbtxt"
    path.unlink()  # it may be a link to the committed one
    path.write_text(text_format.MessageToString(models[-1].config))


def _weights(models: Sequence[Model]) -> dict[str, str]:
    file = next((model.file for model in models if model.file and model.config.backend != "python"), None)
    manifest = manifest_of(file) if file else None
    if manifest is None:
        return {}
    return {MODEL: manifest.model, CHECKPOINT: manifest.checkpoint_sha256 or manifest.pretrained}


def manifest_of(file: Path) -> Manifest | None:
    """The exported graph's, also of a plan that was built of it."""
    if file.suffix != ".plan":
        return Manifest.read(file)
    plan = EngineManifest.read(file)
    graph = Manifest.read(file.parents[2] / "clip_onnx" / "1" / plan.onnx) if plan else None
    return graph if plan and graph and graph.sha256 == plan.onnx_sha256 else None


def _preprocessing(models: Sequence[Model]) -> dict[str, str]:
    found = [model.config.parameters for model in models if "formats" in model.config.parameters]
    if not found:
        return {}
    value = {name: parameter.string_value for name, parameter in found[0].items()}
    oriented = value.get("orientation", "ignore")
    return {
        PREPROCESS: value["mode"] + ("" if oriented == "ignore" else f", orientation {oriented}"),
        SUFFIXES: " ".join(suffixes_of(value["formats"].split())),
    }


def suffixes_of(formats: Sequence[str]) -> list[str]:
    """The endings of files in these formats, by Pillow's own table."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("server", error) from error
    open_heif_too()
    taken = {"MPO", *formats} if "JPEG" in formats else set(formats)  # an MPO begins as a JPEG does
    return sorted({suffix for suffix, name in Image.registered_extensions().items() if name in taken})
