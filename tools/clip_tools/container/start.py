"""Decides what a start of the container does, from the settings and from what is available."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_tools.container.settings import USAGE, Settings
from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import config_names, deployment, engine_of, graph_name

_MOUNT = "mount the folder with it at CLIP_ONNX_DIR (-v $PWD/models/clip_onnx/1:/onnx:ro)"


@dataclass(frozen=True)
class Available:
    """What the container has.

    `onnx` are the mounted and the exported graphs by file name, `onnx_engine_file` is the one to serve without a plan.
    """

    onnx: Mapping[str, Path]
    can_export: bool
    gpu: str | None
    onnx_engine_file: str


@dataclass(frozen=True)
class Start:
    """What to do: export these precisions, build a plan from `graph` (None: no plan), serve `config_name`."""

    exports: tuple[str, ...]
    graph: str | None
    config_name: str | None


def decide_start(settings: Settings, found: Available) -> Start:
    """What this start does. Raises ToolError for what is missing, with what to mount or set."""
    if settings.skip_build:
        return Start(_exports(found, found.onnx_engine_file), None, settings.config_name)
    graph = graph_name(settings.precision)
    exports = _exports(found, graph)
    if found.gpu is None and settings.runtime == "tensorrt":
        raise ToolError(
            "a TensorRT plan is built on the GPU that runs it, and no GPU was found: start the container with --gpus "
            "all, or serve the ONNX model with SKIP_TRT_BUILD=1"
        )
    return Start(exports, graph, "trt")


def _exports(found: Available, graph: str) -> tuple[str, ...]:
    """The precisions to export to have `graph`."""
    if graph in found.onnx:
        return ()
    precision = Path(graph).stem.removeprefix("model").removeprefix(".") or "fp32"
    if not found.can_export:
        raise ToolError(
            f"{graph} is missing: make it with `clip-tools export-onnx --precision {precision}` and {_MOUNT}; or "
            "build the image with --build-arg WITH_EXPORT=1, which exports at startup"
        )
    return (precision,)


def find_available(settings: Settings, models: Path = MODELS) -> Available:
    """What is mounted, cached and installed, and the GPU."""
    if settings.config_name and settings.config_name not in config_names(models):
        raise ToolError(
            f"CLIP_CONFIG_NAME={settings.config_name}: expected one of {', '.join(config_names(models))}",
            exit_code=USAGE,
        )
    onnx = {path.name: path for folder in (exported_dir(settings), settings.onnx_dir) for path in folder.glob("*.onnx")}
    engine = engine_of(deployment(models, settings.config_name))
    if engine.name == "clip_trt":
        raise ToolError(f"CLIP_CONFIG_NAME={settings.config_name} needs a plan: remove SKIP_TRT_BUILD", exit_code=USAGE)
    return Available(
        onnx=onnx,
        can_export=_is_installed("torch") and _is_installed("open_clip"),
        gpu=gpu_name(),
        onnx_engine_file=engine.file.name if engine.file else "model.onnx",
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def exported_dir(settings: Settings) -> Path:
    """The folder for this container's exports of the given model and checkpoint."""
    key = hashlib.sha256(f"{settings.model} {settings.checkpoint}".encode()).hexdigest()[:12]
    return settings.cache_dir / "onnx" / key


def gpu_name() -> str | None:
    """Name and compute capability of the first GPU, such as "NVIDIA L4, 8.9". None: no GPU or driver."""
    gpu = find_gpu()
    return f"{gpu.name}, {gpu.compute_capability}" if gpu else None
