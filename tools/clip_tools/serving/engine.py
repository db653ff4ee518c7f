"""What is known of an engine without running it: its file, graph, manifest, precision and preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.accuracy.gates import Precision
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.external_data import load_nodes
from clip_tools.export.manifest import Manifest
from clip_tools.export.precision import precision_of
from clip_tools.oracle import Orientation
from clip_tools.paths import MODELS
from clip_tools.repository import config_names, deployment
from clip_tools.tensorrt.plan_manifest import PlanManifest


@dataclass(frozen=True)
class Engine:
    """What embeds images: a .onnx or .plan file, a named configuration to serve here (None: default), or a server."""

    file: Path | None = None
    config_name: str | None = None
    url: str | None = None
    models: Path = MODELS

    @property
    def title(self) -> str:
        """Its name in reports."""
        if self.file:
            return self.file.name
        return self.url or f"clip_ensemble, configuration {self.config_name or 'by default'}"

    @property
    def model_file(self) -> Path | None:
        """The file that it runs; None for a running server that does not say."""
        if self.file or self.url:
            return self.file
        files = [m.file for m in deployment(self.models, self.config_name) if m.config.backend != "python"]
        return next((file for file in files if file is not None), None)


def find_engine(name: str | None, url: str | None, models: Path = MODELS) -> Engine:
    """The engine of `--engine` or `--url`. Raises ToolError if it is missing, or if both or none are given."""
    if (name is None) == (url is None):
        raise ToolError("expected either --engine or --url", exit_code=2)
    if name is None:
        return Engine(url=url, models=models)
    if Path(name).suffix in (".onnx", ".plan"):
        if not Path(name).is_file():
            raise ToolError(f"--engine {name}: no such file", exit_code=2)
        return Engine(file=Path(name), models=models)
    known = config_names(models)
    if name not in ("default", *known):
        raise ToolError(
            f"--engine {name}: expected a .onnx or .plan file, or a configuration to serve: default, "
            f"{', '.join(known)}",
            exit_code=2,
        )
    return Engine(config_name=None if name == "default" else name, models=models)


def precision_of_engine(engine: Engine, graph: Manifest | None = None) -> Precision:
    """The precision of its matrices: by its configuration, its plan's manifest, or its graph's manifest or types.

    A running server counts as FP32. Raises ToolError for a plan without a manifest, and a file that is no graph.
    """
    file = engine.model_file
    if file is None:
        return "fp32"
    if engine.file is None:  # as served: the same graph may run in BF16
        for model in deployment(engine.models, engine.config_name):
            accelerators = model.config.optimization.execution_accelerators.cpu_execution_accelerator
            if any(accelerator.name == "openvino_bf16" for accelerator in accelerators):
                return "bf16"
    if file.suffix == ".plan":
        manifest = PlanManifest.read(file)
        if manifest is None:
            raise ToolError(f"{file} has no manifest that says its precision: give it with --precision", exit_code=2)
        return manifest.precision
    return graph.precision if graph else precision_of(_load(file))


def has_exact_pixels(engine: Engine) -> bool:
    """Whether its `preprocess` should give open_clip's exact pixels. True for a running server, which does not say."""
    if engine.file or engine.url:
        return True
    parameters = [model.config.parameters for model in deployment(engine.models, engine.config_name)]
    return all(found["mode"].string_value == "exact" for found in parameters if "mode" in found)


def orientation_of(engine: Engine) -> Orientation:
    """The orientation of its `preprocess`; "ignore" for a running server, which does not say."""
    if engine.file or engine.url:
        return "ignore"
    parameters = [model.config.parameters for model in deployment(engine.models, engine.config_name)]
    return "exif" if any(found["orientation"].string_value == "exif" for found in parameters) else "ignore"


def graph_of(file: Path) -> tuple[Path, Manifest] | None:
    """(The exported graph, its manifest): this file, or the graph that this plan was built from; None if unknown."""
    plan = PlanManifest.read(file) if file.suffix == ".plan" else None
    if plan:
        file = file.absolute().parents[2] / "clip_onnx" / "1" / plan.onnx
    manifest = Manifest.read(file) if file.suffix != ".plan" else None
    if manifest is None or (plan and plan.onnx_sha256 != manifest.sha256):
        return None
    return file, manifest


def unchanged_graph_of(file: Path) -> tuple[Path, Manifest] | None:
    """The same; None also if the graph is missing or differs from its manifest."""
    known = graph_of(file)
    return known if known and known[0].is_file() and sha256_of(known[0]) == known[1].sha256 else None


def manifest_of(file: Path | None) -> Manifest | None:
    """The manifest of `graph_of`."""
    known = graph_of(file) if file else None
    return known[1] if known else None


def _load(file: Path) -> Any:
    try:
        return load_nodes(file)
    except Exception as error:  # protobuf's own
        raise ToolError(f"{file} is no ONNX file: {' '.join(str(error).split())[:200]}") from error
