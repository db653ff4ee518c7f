"""Opens the two steps of a deployment in this process, exactly as they are served."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from clip_tools.errors import ToolError, needs_extra
from clip_tools.gpu import find_gpu
from clip_tools.paths import BACKENDS, MODELS, import_from
from clip_tools.repository import deployment, parameters_of, read_config


def import_preprocess(models: Path = MODELS) -> Any:
    """`clip_preprocess` of the model repository: what `preprocess` runs for one image."""
    return import_from(models / "preprocess" / "1", "clip_preprocess")


def _parameters(models: Path, config_name: str | None) -> dict[str, str]:
    return parameters_of(read_config(models, "preprocess", config_name))


def open_preprocess(models: Path = MODELS, config_name: str | None = None) -> Callable[[bytes], Any]:
    """The function that `preprocess` runs for one image under this configuration: bytes -> (224, 224, 3) uint8 RGB."""
    opened: Callable[[bytes], Any] = import_preprocess(models).open_pixels(_parameters(models, config_name))
    return opened


def open_batches(models: Path = MODELS, config_name: str | None = "gpu") -> Callable[[Sequence[bytes]], Any]:
    """The same for many images at once on a GPU; the pixels stay there. Raises ToolError if it cannot run here."""
    preprocess = import_preprocess(models)
    try:
        clip_gpu = import_from(models / "preprocess" / "1", "clip_gpu")
        batches = clip_gpu.open_batches(_parameters(models, config_name))
    except ValueError as error:
        raise ToolError(str(error)) from error
    unlimited = preprocess.PixelBudget
    return lambda images: batches([(one, unlimited(1 << 62)) for one in images], batches.on_cpu)


def open_engine(models: Path = MODELS, config_name: str | None = None) -> Any:
    """The ONNX Runtime session that `backends/onnxruntime` opens for this deployment on this machine.

    Raises ToolError with the backend's reason if it cannot be opened.
    """
    file, settings = engine_settings(models, config_name)
    with _backend() as backend:
        return backend.open_session(file, settings)


def engine_settings(models: Path = MODELS, config_name: str | None = None) -> tuple[Path, Any]:
    """The deployment's ONNX file and its `SessionSettings` on this machine. Raises ToolError if there is none."""
    model = next((one for one in deployment(models, config_name) if one.config.backend == "onnxruntime"), None)
    if model is None or model.file is None:
        raise ToolError(f"the deployment '{config_name or 'default'}' has no onnxruntime model to run bare")
    config = json.loads(json_format.MessageToJson(model.config, preserving_proto_field_name=True))
    with _backend() as backend:
        return model.file, backend.session_settings(config, instance_kind(model.config), 0)


def runs_here(models: Path, config_name: str) -> bool:
    """Whether this machine has the providers and the precision that a configuration asks for."""
    _, settings = engine_settings(models, config_name)
    try:
        with _backend() as backend:
            backend.check_settings(settings)
    except ToolError:
        return False
    return True


def import_backend() -> Any:
    """`ort_session` of `backends/onnxruntime`: what the embedded server runs for an ONNX model."""
    with needs_extra("cpu"):
        return import_from(BACKENDS / "onnxruntime", "ort_session")


@contextlib.contextmanager
def _backend() -> Iterator[Any]:
    """The same; its ConfigError becomes a ToolError."""
    backend = import_backend()
    try:
        yield backend
    except backend.ConfigError as error:
        raise ToolError(str(error)) from error


def instance_kind(config: Any) -> str:
    """Where Triton runs the model on this machine, "GPU" or "CPU": KIND_AUTO is the GPU where there is one."""
    kinds = {group.Kind.Name(group.kind) for group in config.instance_group} or {"KIND_AUTO"}
    is_gpu = "KIND_GPU" in kinds or ("KIND_AUTO" in kinds and find_gpu() is not None)
    return "GPU" if is_gpu else "CPU"
