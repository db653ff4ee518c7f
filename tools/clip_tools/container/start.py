"""What a start of the container has to do, decided from the settings and from what the machine has."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_tools.container.settings import USAGE, Settings
from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import config_names, deployment, graph_name

_MOUNT = "mount the folder with it at CLIP_ONNX_DIR (-v $PWD/models/clip_onnx/1:/onnx:ro)"


@dataclass(frozen=True)
class Found:
    """What the machine has. `onnx`: the graphs that are mounted or were exported before, by file name."""

    onnx: Mapping[str, Path]
    can_export: bool
    gpu: str | None
    onnx_engine_file: str


@dataclass(frozen=True)
class Start:
    """What to do: export these precisions, build a plan from `graph` (None: no plan), serve under `config_name`."""

    exports: tuple[str, ...]
    graph: str | None
    config_name: str | None


def plan_start(settings: Settings, found: Found) -> Start:
    """What this start has to do. Raises ToolError for what cannot be had, with what to mount or to set."""
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


def _exports(found: Found, graph: str) -> tuple[str, ...]:
    """The precisions to export so that `graph` is there."""
    if graph in found.onnx:
        return ()
    precision = Path(graph).stem.removeprefix("model").removeprefix(".") or "fp32"
    if not found.can_export:
        raise ToolError(
            f"{graph} was not found: make it with `clip-tools export-onnx --precision {precision}` and {_MOUNT}; or "
            "build the image with --build-arg WITH_EXPORT=1, which exports by itself"
        )
    return (precision,)


def look(settings: Settings, models: Path = MODELS) -> Found:
    """What is mounted, cached and installed, and the GPU."""
    if settings.config_name and settings.config_name not in config_names(models):
        raise ToolError(
            f"CLIP_CONFIG_NAME={settings.config_name}: expected one of {', '.join(config_names(models))}",
            exit_code=USAGE,
        )
    onnx = {path.name: path for folder in (exported_dir(settings), settings.onnx_dir) for path in folder.glob("*.onnx")}
    engine = deployment(models, settings.config_name)[-2]
    if engine.name == "clip_trt":
        raise ToolError(
            f"CLIP_CONFIG_NAME={settings.config_name} needs a plan: leave SKIP_TRT_BUILD out", exit_code=USAGE
        )
    return Found(
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
    """Where this container keeps its own exports: one folder for each model and checkpoint asked for."""
    key = hashlib.sha256(f"{settings.model} {settings.checkpoint}".encode()).hexdigest()[:12]
    return settings.cache_dir / "onnx" / key


def gpu_name() -> str | None:
    """Name and compute capability of the first GPU, as in "NVIDIA L4, 8.9". None: no driver answers."""
    gpu = find_gpu()
    return f"{gpu.name}, {gpu.compute_capability}" if gpu else None
