"""Reads the model repository: the models of a deployment, their configurations, and missing files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError, needs_extra

ENSEMBLE = "clip_ensemble"
TEXT_ENSEMBLE = "clip_text_ensemble"

_DEFAULT_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
_BUILT_BY = {"onnxruntime": "clip-tools export-onnx", "tensorrt": "clip-tools build-engine"}


@dataclass(frozen=True)
class Model:
    """One model of a deployment: its name, its `ModelConfig`, and the file it runs (None for an ensemble)."""

    name: str
    config: Any
    file: Path | None


def graph_name(precision: str) -> str:
    """The file name of the exported graph of a precision: `model.onnx` for FP32, `model.fp16.onnx` and so on."""
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


def config_names(models: Path) -> list[str]:
    """The named configurations of a repository, for `--model-config-name`."""
    return sorted({path.stem for path in models.glob("*/configs/*.pbtxt")})


def config_path(models: Path, name: str, config_name: str | None = None) -> Path:
    """The file of model `name`'s configuration: the named one if it has one, else config.pbtxt."""
    named = models / name / "configs" / f"{config_name}.pbtxt"
    return named if config_name and named.is_file() else models / name / "config.pbtxt"


def read_config(models: Path, name: str, config_name: str | None = None) -> Any:
    """The `ModelConfig` in the file of `config_path`. Raises ToolError if it is missing or invalid."""
    with needs_extra("server"):
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    path = config_path(models, name, config_name)
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except FileNotFoundError as error:
        raise ToolError(
            f"{path} does not exist: expected a model repository. Run this in a checkout, or give --models"
        ) from error
    except text_format.ParseError as error:
        raise ToolError(f"{path} is not a Triton model configuration: {error}") from error


def write_config(models: Path, name: str, config: Any, config_name: str | None, *, comment: str = "") -> Path:
    """Write a model's configuration, named or plain, below a comment; return its path."""
    folder = models / name
    path = folder / "configs" / f"{config_name}.pbtxt" if config_name else folder / "config.pbtxt"
    path.parent.mkdir(exist_ok=True)
    replace_config(path, config, comment=comment)
    return path


def replace_config(path: Path, config: Any, *, comment: str = "") -> None:
    """Write a configuration file, below a comment. A link is replaced: its target may be in another repository."""
    from google.protobuf import text_format

    head = "".join(f"# {line}\n" for line in comment.splitlines())
    path.unlink(missing_ok=True)
    path.write_text(head + text_format.MessageToString(config))


def deployment(models: Path, config_name: str | None = None, *, root: str = ENSEMBLE) -> list[Model]:
    """The model `root` and its ensemble steps, the steps first. Raises ToolError for an unknown configuration name."""
    is_repository = (models / root / "config.pbtxt").is_file()
    if is_repository and config_name and config_name not in config_names(models):
        known = ", ".join(config_names(models)) or "none"
        raise ToolError(f"no model in {models} has a configuration named '{config_name}'; expected one of: {known}")
    config = read_config(models, root, config_name)
    steps = [
        model
        for step in config.ensemble_scheduling.step
        for model in deployment(models, config_name, root=step.model_name)
    ]
    file = None
    if not config.HasField("ensemble_scheduling"):
        filename = config.default_model_filename or _DEFAULT_FILES.get(config.backend, "model")
        versions = sorted((int(p.name) for p in (models / root).iterdir() if p.name.isdigit()), reverse=True)
        file = models / root / str(versions[0] if versions else 1) / filename
    return [*steps, Model(root, config, file)]


def parameters_of(config: Any) -> dict[str, str]:
    """The values of a `ModelConfig`'s parameters by name."""
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


def engine_of(deployed: Sequence[Model]) -> Model:
    """The model of a deployment that makes the embeddings: the last step before the ensemble itself."""
    return deployed[-2]


def text_deployment(models: Path, config_name: str | None = None) -> list[Model]:
    """The models that embed texts; none if no text tower was exported."""
    if not (models / TEXT_ENSEMBLE / "config.pbtxt").is_file():
        return []
    found = deployment(models, config_name, root=TEXT_ENSEMBLE)
    file = engine_of(found).file
    return found if file and file.is_file() else []


def build_command(model: Model) -> str | None:
    """The command that makes the model's file; None for a committed file."""
    how = _BUILT_BY.get(model.config.backend)
    if how and any(tensor.name == "tokens" for tensor in model.config.input):
        return f"{how} --text"
    words = model.file.name.split(".")[1:-1] if how and model.file and model.config.backend == "onnxruntime" else []
    if words and words[-1].startswith("part"):  # model.NAME.part1.onnx
        return f"clip-tools tune-precision --apply {words[0]}"
    return f"{how} --precision {words[0]}" if words else how  # model.fp16.onnx


def check_files(models: list[Model]) -> None:
    """Raises ToolError if a model's file is missing, with the command that makes it."""
    for model in models:
        if model.file and not model.file.is_file():
            how = build_command(model)
            raise ToolError(
                f"{model.name} needs {model.file}, which does not exist: "
                + (f"make it with `{how}`" if how else "check the repository out again")
            )
