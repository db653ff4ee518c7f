"""The provenance of the served vectors: model, weights and preprocessing, as parameters of the ensemble.

Clients store it with the vectors, so that an index does not mix vectors of different weights.
"""

from collections.abc import Sequence
from pathlib import Path

from clip_embed.server_info import CHECKPOINT, MODEL, PREPROCESS, SUFFIXES
from clip_tools.errors import needs_extra
from clip_tools.oracle import register_heif
from clip_tools.repository import ENSEMBLE, Model, config_path, deployment, replace_config
from clip_tools.serving.engine import manifest_of


def set_provenance(models: Sequence[Model]) -> None:
    """Set the parameters of a deployment's ensemble, its last model. What is unknown is left out."""
    parameters = models[-1].config.parameters
    found = {**_weight_parameters(models), **_preprocess_parameters(models)}
    for name in (MODEL, CHECKPOINT, PREPROCESS, SUFFIXES):
        parameters.pop(name, None)
        if found.get(name):
            parameters[name].string_value = found[name]


def write_provenance(folder: Path, config_name: str | None) -> None:
    """Write them to the ensemble's configuration file in the repository that is served."""
    models = deployment(folder, config_name)
    set_provenance(models)
    replace_config(config_path(folder, ENSEMBLE, config_name), models[-1].config)


def _weight_parameters(models: Sequence[Model]) -> dict[str, str]:
    file = next((model.file for model in models if model.file and model.config.backend != "python"), None)
    manifest = manifest_of(file)
    return dict(zip((MODEL, CHECKPOINT), manifest.identity, strict=True)) if manifest else {}


def _preprocess_parameters(models: Sequence[Model]) -> dict[str, str]:
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
    """The file name suffixes of these formats, by Pillow's table."""
    with needs_extra("server"):
        from PIL import Image
    register_heif()
    accepted = {"MPO", *formats} if "JPEG" in formats else set(formats)  # an MPO starts as a JPEG
    return sorted({suffix for suffix, name in Image.registered_extensions().items() if name in accepted})
