"""Checks a plan against its `config.pbtxt` and finds the TensorRT that built it. Needs neither a GPU nor TensorRT."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# TensorRT's name for a type -> Triton's. BF16 and FP8 are missing because numpy does not have them.
TRITON_TYPES = {
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "HALF": "TYPE_FP16",
    "FLOAT": "TYPE_FP32",
}

# The runtime's name in the manifest -> its module.
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_OTHERWISE = "or serve through clip_onnx, without --model-config-name=trt"


class PlanError(ValueError):
    """The plan, the library or the machine does not match the configuration."""


@dataclass(frozen=True)
class PlanTensor:
    """One tensor of an engine.

    `type` is Triton's name. `dims` begins with the batch (-1: dynamic). `batches` is the smallest and largest batch
    that the optimisation profile allows for an input (None: an output).
    """

    name: str
    type: str
    dims: tuple[int, ...]
    batches: tuple[int, int] | None


def check_machine(kind: str) -> None:
    """Raises PlanError unless Triton gave this instance a GPU."""
    if kind != "GPU":
        raise PlanError(
            f"a plan needs an NVIDIA GPU, and this server sees none: start it on a machine with one, {_OTHERWISE}"
        )


def find_tensorrt(plan: Path, importer: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    """The library that built the plan, according to its manifest; without a manifest, the first installed one."""
    runtime = _runtime_of(plan)
    if runtime is not None and runtime not in _MODULES:
        raise PlanError(f"{plan.name} was built by '{runtime}': expected one of {', '.join(_MODULES)}")
    wanted = [runtime] if runtime else list(_MODULES)
    for name in wanted:
        try:
            return importer(_MODULES[name])
        except ImportError:
            continue
    raise PlanError(
        f"{plan.name} needs {' or '.join(wanted)}, which is not installed here: pip install {wanted[0]}, {_OTHERWISE}"
    )


def _runtime_of(plan: Path) -> str | None:
    """The runtime in the manifest beside a plan; None if there is no readable manifest."""
    try:
        return str(json.loads(plan.with_name("manifest.json").read_text())["runtime"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def plan_tensors(engine, trt: ModuleType) -> list[PlanTensor]:
    """The tensors of an `ICudaEngine`, inputs and outputs."""
    tensors = []
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        batches = None
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, _, high = engine.get_tensor_profile_shape(name, 0)
            batches = (int(low[0]), int(high[0]))
        type_name = engine.get_tensor_dtype(name).name
        tensors.append(
            PlanTensor(
                name=name,
                type=TRITON_TYPES.get(type_name, type_name),
                dims=tuple(int(size) for size in engine.get_tensor_shape(name)),
                batches=batches,
            )
        )
    return tensors


def check_contract(config: dict, tensors: list[PlanTensor]) -> None:
    """Raises PlanError unless the plan matches the configuration's tensors (names, types, dims) and batch sizes."""
    for title, declared, is_input in (("input", config["input"], True), ("output", config["output"], False)):
        found = {tensor.name: tensor for tensor in tensors if (tensor.batches is not None) == is_input}
        names = {entry["name"] for entry in declared}
        if names != set(found):
            raise PlanError(f"config.pbtxt has {title} {_names(names)}, the plan {_names(found)}")
        for entry in declared:
            tensor, dims = found[entry["name"]], tuple(int(size) for size in entry["dims"])
            if tensor.type != entry["data_type"]:
                raise PlanError(
                    f"{title} '{tensor.name}': config.pbtxt says {entry['data_type']}, the plan {tensor.type}"
                )
            if tensor.dims[1:] != dims:
                raise PlanError(
                    f"{title} '{tensor.name}': config.pbtxt says dims {list(dims)}, the plan {list(tensor.dims[1:])}"
                )
            if tensor.batches is not None:
                _check_batches(config.get("max_batch_size", 0), tensor)


def _check_batches(max_batch: int, tensor: PlanTensor) -> None:
    low, high = tensor.batches
    if low > 1 or high < max_batch:
        raise PlanError(
            f"config.pbtxt allows batches of 1 to {max_batch}, but the plan accepts {low} to {high}: rebuild the plan "
            f"with `clip-tools build-engine --max-batch {max_batch}`"
        )


def _names(names) -> str:
    return ", ".join(sorted(names)) or "none"
