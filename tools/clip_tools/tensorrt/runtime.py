"""TensorRT and TensorRT for RTX: two libraries with one Python API."""

import importlib
from typing import Any, Literal, get_args

from clip_tools.errors import ToolError

Runtime = Literal["tensorrt", "tensorrt-rtx"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

_MODULES: dict[Runtime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL: dict[Runtime, str] = {
    "tensorrt": "make setup-trt, or pip install 'clip-embed[trt]'",
    "tensorrt-rtx": "pip install 'clip-embed[rtx]'",
}
MIN_VERSION: dict[Runtime, tuple[int, ...]] = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 3)}


def load_tensorrt(runtime: Runtime) -> Any:
    """The library's Python module. Raises ToolError if it is missing, broken or too old."""
    if runtime not in RUNTIMES:
        raise ToolError(f"--runtime {runtime}: expected one of {', '.join(RUNTIMES)}", exit_code=2)
    try:
        module = importlib.import_module(_MODULES[runtime])
    except ImportError as error:
        raise ToolError(f"{runtime} is not installed ({error}): {_INSTALL[runtime]}", exit_code=2) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < MIN_VERSION[runtime]:
        least = ".".join(map(str, MIN_VERSION[runtime]))
        raise ToolError(f"{runtime} {module.__version__} is too old: {least} or newer is needed", exit_code=2)
    return module


def installed_version(runtime: Runtime) -> str | None:
    """The installed version of the library; None if it is missing. Does not touch the GPU."""
    try:
        return str(load_tensorrt(runtime).__version__)
    except ToolError:
        return None
