"""The container's settings, read from environment variables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from clip_tools.accuracy.gates import PRECISIONS, Precision
from clip_tools.errors import ToolError
from clip_tools.serving.access import OPEN_METADATA_VARIABLE, keys_in
from clip_tools.serving.machine import INSTANCES_VARIABLE
from clip_tools.serving.vector_check import CHECK_VECTORS_VARIABLE
from clip_tools.tensorrt.runtime import RUNTIMES, Runtime

USAGE = 2  # exit code


@dataclass(frozen=True)
class Settings:
    """docs/container.md describes the variables. `keys` are arguments of `serving.access.Access`."""

    precision: Precision = "fp16"
    opt_batch: int = 16
    max_batch: int = 64
    skip_build: bool = False
    fallback: bool = False
    runtime: Runtime = "tensorrt"
    config_name: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    onnx_dir: Path = Path("/onnx")
    cache_dir: Path = Path("/var/cache/clip-embed")
    preprocess_instances: int | None = None
    check_vectors: bool = True
    open_metadata: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """The settings. Raises ToolError with the variable, the expected value and the given one."""
        read = _Reader(environment)
        max_batch = read.number("TRT_MAX_BATCH", 64)
        settings = cls(
            precision=read.precision(),
            opt_batch=read.number("TRT_OPT_BATCH", min(16, max_batch)),
            max_batch=max_batch,
            skip_build=read.flag("SKIP_TRT_BUILD"),
            fallback=read.flag("TRT_FALLBACK"),
            runtime=cast(Runtime, read.one_of("TRT_RUNTIME", RUNTIMES, "tensorrt")),
            config_name=read.text("CLIP_CONFIG_NAME"),
            model=read.text("CLIP_MODEL"),
            checkpoint=read.text("CLIP_CHECKPOINT"),
            onnx_dir=Path(read.text("CLIP_ONNX_DIR") or "/onnx").absolute(),
            cache_dir=Path(read.text("CLIP_CACHE_DIR") or "/var/cache/clip-embed").absolute(),
            preprocess_instances=read.number(INSTANCES_VARIABLE) if read.text(INSTANCES_VARIABLE) else None,
            check_vectors=read.flag(CHECK_VECTORS_VARIABLE, default="1"),
            open_metadata=read.flag(OPEN_METADATA_VARIABLE),
            keys=keys_in(environment),
        )
        if settings.opt_batch > settings.max_batch:
            raise ToolError(
                f"TRT_OPT_BATCH={settings.opt_batch}: expected at most TRT_MAX_BATCH, {settings.max_batch}",
                exit_code=USAGE,
            )
        if settings.config_name and not settings.skip_build:
            raise ToolError(
                f"CLIP_CONFIG_NAME={settings.config_name}: it chooses an ONNX engine, which requires SKIP_TRT_BUILD=1; "
                "without that the container serves 'trt'",
                exit_code=USAGE,
            )
        return settings


@dataclass(frozen=True)
class _Reader:
    environment: Mapping[str, str]

    def text(self, name: str) -> str | None:
        return self.environment.get(name, "").strip() or None

    def one_of(self, name: str, known: tuple[str, ...], default: str) -> str:
        value = self.text(name) or default
        if value not in known:
            raise ToolError(f"{name}={value}: expected one of {', '.join(known)}", exit_code=USAGE)
        return value

    def precision(self) -> Precision:
        """From TRT_PRECISION, or from TRT_FP16, which other containers use for it."""
        fp16 = "fp16" if self.flag("TRT_FP16", default="1") else "fp32"
        precision = self.one_of("TRT_PRECISION", PRECISIONS, fp16)
        if self.text("TRT_FP16") and precision != fp16:
            raise ToolError(
                f"TRT_FP16={self.text('TRT_FP16')} means TRT_PRECISION={fp16}, but TRT_PRECISION={precision} is set "
                "too: remove TRT_FP16",
                exit_code=USAGE,
            )
        return cast(Precision, precision)

    def number(self, name: str, default: int = 1) -> int:
        value = self.text(name) or str(default)
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise ToolError(f"{name}={value}: expected a whole number from 1", exit_code=USAGE)
        return int(value)

    def flag(self, name: str, default: str = "0") -> bool:
        value = self.text(name) or default
        if value not in ("0", "1"):
            raise ToolError(f"{name}={value}: expected 1 or 0, default {default}", exit_code=USAGE)
        return value == "1"
