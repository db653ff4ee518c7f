"""A mix of FP32 and BF16 layers: opens it as it is served, and writes it as a named configuration."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.accuracy.gates import Agreement
from clip_tools.errors import ToolError
from clip_tools.export.export_onnx import make_manifest
from clip_tools.export.manifest import Manifest, put_in_place
from clip_tools.export.parts import Layer, cut, layers
from clip_tools.in_process import import_backend
from clip_tools.oracle import Weights
from clip_tools.paths import MODELS
from clip_tools.repository import config_names, read_config, write_config

if TYPE_CHECKING:
    import onnx

PartPrecision = Literal["fp32", "bf16"]
BATCH = 16  # images of the batch that mixes are timed on
_MARK = "Written by `clip-tools tune-precision`"


@dataclass(frozen=True)
class Mix:
    """A measured mix: the precision of each layer, its agreement with open_clip, and its speed relative to FP32.

    `parts` is the number of files. `ratio` is the median of the rounds, beside their lowest and highest.
    """

    precisions: tuple[PartPrecision, ...]
    parts: int
    agreement: Agreement
    ratio: float
    ratio_lowest: float
    ratio_highest: float
    images_per_s: float

    @property
    def lowered(self) -> int:
        """How many layers are in BF16."""
        return self.precisions.count("bf16")


class LayeredGraph:
    """Opens a graph in any mix of precisions, as `backends/onnxruntime` serves it; `folder` is for temporary files."""

    def __init__(self, model: "onnx.ModelProto", folder: Path) -> None:
        self.model = model
        self.layers: list[Layer] = layers(model)
        self._folder = folder

    def parts(self, precisions: Sequence[PartPrecision]) -> "tuple[list[onnx.ModelProto], list[PartPrecision]]":
        """(The parts of a mix, the precision of each). Neighbouring layers of one precision form one part."""
        starts = [i for i in range(1, len(precisions)) if precisions[i] != precisions[i - 1]]
        return cut(self.model, [self.layers[i].first for i in starts]), [precisions[i] for i in (0, *starts)]

    def single_layers(self) -> "list[onnx.ModelProto]":
        """Each layer as a separate part."""
        return cut(self.model, [layer.first for layer in self.layers[1:]])

    def open(self, precisions: Sequence[PartPrecision]) -> Any:
        """The session of a mix, with one precision for each layer."""
        return self.open_parts(*self.parts(precisions))

    def open_parts(self, parts: "Sequence[onnx.ModelProto]", precisions: Sequence[PartPrecision]) -> Any:
        """The session of these parts, each in its precision. Raises ToolError if the backend refuses them."""
        import onnx

        for number, part in enumerate(parts, 1):
            onnx.save(part, str(self._folder / f"model.tried.part{number}.onnx"))
        backend = import_backend()
        try:
            return backend.open_session(self._folder / "model.tried.part1.onnx", _settings(backend, precisions))
        except backend.ConfigError as error:
            raise ToolError(f"a mix of {' '.join(precisions)} cannot be served here: {error}") from error


def check_machine() -> None:
    """Raises ToolError on a machine that cannot serve a mix of FP32 and BF16."""
    backend = import_backend()
    try:
        backend.check_settings(_settings(backend, ["fp32", "bf16"]))
    except backend.ConfigError as error:
        raise ToolError(f"a mix of FP32 and BF16 cannot be served here: {error}") from error


def _settings(backend: Any, precisions: Sequence[PartPrecision]) -> Any:
    """The backend's `SessionSettings` for a mix in these precisions."""
    accelerator = {"name": "openvino_bf16", "parameters": {"parts": " ".join(precisions)}}
    config = {"optimization": {"execution_accelerators": {"cpu_execution_accelerator": [accelerator]}}}
    return backend.session_settings(config, "CPU", 0)


def check_name(name: str, models: Path = MODELS) -> None:
    """Raises ToolError for an invalid configuration name, or one whose configuration `tune-precision` did not write."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ToolError(f"--apply {name}: expected lower-case letters, digits and hyphens", exit_code=2)
    if name in config_names(models) and not _is_ours(models, name):
        raise ToolError(f"--apply {name}: there is a configuration of this name; take another", exit_code=2)


def comment_of(result: dict[str, Any], mix: Mix) -> str:
    """The comment at the top of a mix's configuration: where it was measured, and the result."""
    environment, found = result["environment"], mix.agreement
    return (
        f"on {environment['cpu']}, {environment['cores']} cores, {environment['date'][:10]}.\n"
        f"{result['weights']['model']}: {mix.lowered} of {len(mix.precisions)} layers in BF16; worst cosine "
        f"{found.worst_cosine:.5f} over {found.images} photographs, {mix.ratio:.2f} times FP32 at batch {BATCH}."
    )


def apply(mix: Mix, model_path: Path, weights: Weights, name: str, comment: str, models: Path = MODELS) -> list[Path]:
    """Write a mix as configs/NAME.pbtxt of clip_onnx, and its parts beside its model; return the written paths.

    A mix with every layer in BF16 needs no parts.
    """
    import onnx

    check_name(name, models)
    config = read_config(models, "clip_onnx", "cpu-bf16")
    parts, precisions = _cut_for(onnx.load(str(model_path)), mix)
    folder = models / "clip_onnx" / "1"
    for path in [*folder.glob(f"model.{name}.part*.onnx"), *folder.glob(f"manifest.{name}.part*.json")]:
        path.unlink()
    written = []
    if len(parts) > 1:
        config.default_model_filename = f"model.{name}.part1.onnx"
        accelerator = config.optimization.execution_accelerators.cpu_execution_accelerator[0]
        accelerator.parameters["parts"] = " ".join(precisions)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tune-") as scratch:
            for number, part in enumerate(parts, 1):
                draft, target = Path(scratch) / f"{number}.onnx", folder / f"model.{name}.part{number}.onnx"
                onnx.save(part, str(draft))
                put_in_place(draft, _manifest(draft, weights, mix, model_path), target)
                written.append(target)
    note = f"{_MARK} {comment}"
    return [*written, write_config(models, "clip_onnx", config, name, comment=note)]


def _cut_for(model: "onnx.ModelProto", mix: Mix) -> "tuple[list[onnx.ModelProto], list[PartPrecision]]":
    graph = LayeredGraph(model, Path())
    if len(graph.layers) != len(mix.precisions):
        raise ToolError(f"the mix is of {len(mix.precisions)} layers, the graph has {len(graph.layers)}")
    return graph.parts(mix.precisions)


def _manifest(draft: Path, weights: Weights, mix: Mix, whole: Path) -> Manifest:
    """The manifest of a part, with the inputs and outputs of the whole graph."""
    found, made = mix.agreement, Manifest.read(whole)
    further: dict[str, Any] = {"tensors": made.tensors, "fit": made.fit} if made else {}
    return make_manifest(draft, weights, "bf16", found.worst_cosine, found.max_abs, gate=asdict(found), **further)


def _is_ours(models: Path, name: str) -> bool:
    path = models / "clip_onnx" / "configs" / f"{name}.pbtxt"
    return path.is_file() and path.read_text().startswith(f"# {_MARK}")
