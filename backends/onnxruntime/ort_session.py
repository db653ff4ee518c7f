"""Opens the ONNX Runtime session that a `config.pbtxt` describes, or raises an error that says why it cannot."""

import base64
import contextlib
import functools
import importlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime

from ort_bound import BoundSession, ConfigError

_TENSOR_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
}

# `precision_mode` of Triton's TensorRT accelerator -> ONNX Runtime's provider option.
_TENSORRT_PRECISIONS = {"FP32": None, "FP16": "trt_fp16_enable", "BF16": "trt_bf16_enable", "INT8": "trt_int8_enable"}

_INSTALL = {
    "OpenVINOExecutionProvider": "onnxruntime-openvino (`make setup-cpu`, extra `cpu`)",
    "CUDAExecutionProvider": "onnxruntime-gpu (`make setup-gpu`, extra `gpu`)",
    "TensorrtExecutionProvider": "onnxruntime-gpu and TensorRT 10 (`make setup-trt`, extra `trt`)",
}

_GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")

# The ONNX graph c = MatMul(a, b), each (64, 64) float32. The server's environment has no `onnx` to write one.
_ONE_PRODUCT = base64.b64decode(
    "CAg6VQoRCgFhCgFiEgFjIgZNYXRNdWwSAWdaEwoBYRIOCgwIARIICgIIQAoCCEBaEwoBYhIOCgwIARIICgIIQAoCCEBiEwoBYxIOCgwIARII"
    "CgIIQAoCCEBCAhAN"
)

# Triton's numbers for `cudnn_conv_algo_search` -> ONNX Runtime's words.
_CONVOLUTION_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}


@dataclass(frozen=True)
class SessionSettings:
    """The session that a configuration describes: providers in order of preference, and threads (0: the default).

    `parts` holds the providers of each part of a graph that was cut into files, in order; empty for a single file.
    `gpu` is the device number, None for the CPU. `graphs` captures each batch size as a CUDA graph.
    """

    providers: list[tuple[str, dict[str, str]]]
    parts: list[list[tuple[str, dict[str, str]]]] = field(default_factory=list)
    intra_op_threads: int = 0
    inter_op_threads: int = 0
    graph_level: int = 0
    names: list[str] = field(default_factory=list)
    gpu: int | None = None
    graphs: bool = False
    max_batch: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the session computes on a GPU."""
        return self.gpu is not None


def session_settings(
    config: dict, kind: str, device_id: int, *, available: Collection[str] | None = None
) -> SessionSettings:
    """The settings for one instance of `kind` ("CPU" or "GPU") on `device_id`. Raises ConfigError.

    `available` lists the installed providers; None: those of this onnxruntime. Without OpenVINO, FP32 falls back to
    ONNX Runtime's own CPU provider, which gives the same vectors; BF16 has no fallback.
    """
    if available is None:
        available = onnxruntime.get_available_providers()
    has_openvino = "OpenVINOExecutionProvider" in available
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    intra_op_threads = int(parameters.get("intra_op_thread_count", 0))
    optimization = config.get("optimization") or {}
    accelerators = optimization.get("execution_accelerators") or {}
    graphs = kind == "GPU" and bool((optimization.get("cuda") or {}).get("graphs"))
    providers, parts, names = [], [], []
    if kind == "GPU":
        cuda_options = _cuda_options(parameters, graphs)
        for accelerator in accelerators.get("gpu_execution_accelerator", []):
            options = accelerator.get("parameters", {})
            if accelerator["name"] == "tensorrt":
                providers.append(("TensorrtExecutionProvider", _tensorrt_options(options, device_id)))
                names.append(f"TensorRT {options.get('precision_mode', 'FP32')}")
            elif accelerator["name"] == "cuda":
                cuda_options |= options
            else:
                raise ConfigError(f"gpu_execution_accelerator '{accelerator['name']}': expected tensorrt or cuda")
        providers.append(("CUDAExecutionProvider", cuda_options | {"device_id": str(device_id)}))
        if graphs and len(providers) > 1:
            raise ConfigError("optimization.cuda.graphs: expected without the accelerator tensorrt")
        names.append(f"CUDA on GPU {device_id}{' as CUDA graphs' if graphs else ''}")
    else:
        # Default to OpenVINO: Triton's native backend would add a configured CPU accelerator on a GPU too.
        for accelerator in accelerators.get("cpu_execution_accelerator") or [{"name": "openvino"}]:
            precision = {"openvino": "f32", "openvino_bf16": "bf16"}.get(accelerator["name"])
            if precision is None:
                raise ConfigError(
                    f"cpu_execution_accelerator '{accelerator['name']}': expected openvino or openvino_bf16"
                )
            if precision == "f32" and not has_openvino:
                continue
            providers.append(_openvino(precision, intra_op_threads))
            names.append(f"OpenVINO {'FP32' if precision == 'f32' else 'BF16'} on the CPU")
            if options := accelerator.get("parameters"):
                mix = _part_precisions(accelerator["name"], options)
                parts = [[_openvino(one, intra_op_threads), ("CPUExecutionProvider", {})] for one in mix]
                names[-1] = f"OpenVINO on the CPU in {len(mix)} parts, {mix.count('bf16')} of them in BF16"
    providers.append(("CPUExecutionProvider", {}))
    return SessionSettings(
        providers=providers,
        parts=parts,
        intra_op_threads=intra_op_threads,
        inter_op_threads=int(parameters.get("inter_op_thread_count", 0)),
        graph_level=int((optimization.get("graph") or {}).get("level", 0)),
        names=names or ["ONNX Runtime FP32 on the CPU, as OpenVINO is not installed"],
        gpu=device_id if kind == "GPU" else None,
        graphs=graphs,
        max_batch=int(config.get("max_batch_size", 0)),
    )


def _cuda_options(parameters: dict[str, str], graphs: bool) -> dict[str, str]:
    """The CUDA provider's options, without those of the accelerator `cuda`."""
    options = {"enable_cuda_graph": "1"} if graphs else {}
    if search := parameters.get("cudnn_conv_algo_search"):
        if search not in _CONVOLUTION_SEARCHES:
            raise ConfigError(f"cudnn_conv_algo_search '{search}': expected one of {', '.join(_CONVOLUTION_SEARCHES)}")
        options["cudnn_conv_algo_search"] = _CONVOLUTION_SEARCHES[search]
    return options


def _openvino(precision: str, threads: int) -> tuple[str, dict[str, str]]:
    """The OpenVINO provider in this precision on the CPU, with its options; 0 threads: OpenVINO chooses."""
    # Always set the hint: on CPUs with BF16 arithmetic OpenVINO may default to BF16.
    device = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        device["INFERENCE_NUM_THREADS"] = str(threads)
        device["ENABLE_CPU_PINNING"] = "NO"  # otherwise the threads of all instances share the first cores
    return "OpenVINOExecutionProvider", {"device_type": "CPU", "load_config": json.dumps({"CPU": device})}


def _part_precisions(accelerator: str, parameters: dict[str, str]) -> list[str]:
    """OpenVINO's names for the precisions in `parts`, such as "fp32 bf16 fp32": one for each file of a cut graph."""
    known = {"fp32": "f32", "bf16": "bf16"}
    words = parameters.get("parts", "").split()
    if accelerator != "openvino_bf16" or set(parameters) != {"parts"} or not words or not set(words) <= set(known):
        raise ConfigError(
            f"cpu_execution_accelerator '{accelerator}' with {parameters}: expected openvino_bf16 with one parameter, "
            "parts, such as 'fp32 bf16 fp32'"
        )
    return [known[word] for word in words]


def _tensorrt_options(parameters: dict[str, str], device_id: int) -> dict[str, str]:
    """ONNX Runtime's options for the parameters of Triton's TensorRT accelerator."""
    options = {"device_id": str(device_id)}
    for key, value in parameters.items():
        if key == "precision_mode":
            if value not in _TENSORRT_PRECISIONS:
                raise ConfigError(f"precision_mode '{value}': expected one of {', '.join(_TENSORRT_PRECISIONS)}")
            if option := _TENSORRT_PRECISIONS[value]:
                options[option] = "1"
        elif key == "max_workspace_size_bytes":
            options["trt_max_workspace_size"] = value
        elif key.startswith("trt_"):
            options[key] = value
        else:
            raise ConfigError(f"TensorRT accelerator parameter '{key}' is unknown")
    return options


class SessionChain:
    """Sessions that run one after the other; each may read the inputs and all earlier outputs, by name.

    Raises ConfigError if a part needs a tensor that no earlier part produces.
    """

    def __init__(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        self._sessions = sessions
        self._inputs = [[tensor.name for tensor in session.get_inputs()] for session in sessions]
        self._outputs = [[tensor.name for tensor in session.get_outputs()] for session in sessions]
        there = set(self._inputs[0])
        for number, (inputs, outputs) in enumerate(zip(self._inputs, self._outputs, strict=True), 1):
            if missing := set(inputs) - there:
                raise ConfigError(f"part {number} needs {', '.join(sorted(missing))}: the parts are not of one graph")
            there.update(outputs)

    def get_inputs(self) -> list:
        """The first part's inputs."""
        return self._sessions[0].get_inputs()

    def get_outputs(self) -> list:
        """The last part's outputs."""
        return self._sessions[-1].get_outputs()

    def get_providers(self) -> list[str]:
        """The providers, which are the same for every part."""
        return self._sessions[0].get_providers()

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names, as from `InferenceSession.run`."""
        tensors = dict(feeds)
        for session, inputs, outputs in zip(self._sessions, self._inputs, self._outputs, strict=True):
            tensors.update(zip(outputs, session.run(outputs, {name: tensors[name] for name in inputs}), strict=True))
        return [tensors[name] for name in names]


def open_session(
    model_path: Path, settings: SessionSettings
) -> onnxruntime.InferenceSession | SessionChain | BoundSession:
    """A session on the first provider of the settings. Raises ConfigError if ONNX Runtime would silently use another.

    On a GPU, every batch size has run before this returns. With parts, it opens `model.NAME.part1.onnx` and the
    files after it.
    """
    if settings.parts:
        if not model_path.name.endswith(".part1.onnx"):
            raise ConfigError(f"{model_path.name}: expected the first part, whose name ends in .part1.onnx")
        stem = model_path.name.removesuffix("1.onnx")
        return SessionChain(
            [
                open_session(
                    model_path.with_name(f"{stem}{number}.onnx"), replace(settings, providers=providers, parts=[])
                )
                for number, providers in enumerate(settings.parts, 1)
            ]
        )
    check_settings(settings)
    if not model_path.is_file():
        raise ConfigError(f"{model_path} is missing: make it with `{_maker(model_path)}`")
    for name, provider_options in settings.providers:
        if name == "TensorrtExecutionProvider" and (cache := provider_options.get("trt_engine_cache_path")):
            Path(cache).mkdir(parents=True, exist_ok=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.intra_op_threads
    options.inter_op_num_threads = settings.inter_op_threads
    options.log_severity_level = 3
    if settings.graph_level < 0:  # Triton's meaning: -1 basic, 0 default (all), 1 extended
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    elif settings.graph_level > 0:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    wanted = settings.providers[0][0]
    _load_libraries(wanted)
    try:  # no fallback: a session that fails during a request would silently switch to the next provider
        session = onnxruntime.InferenceSession(
            # ONNX Runtime 1.24.1 refuses weights in a second file behind a link: microsoft/onnxruntime#27374.
            str(model_path.resolve()),
            options,
            providers=settings.providers,
            enable_fallback=False,
        )
    except Exception as error:
        needs = f"; {wanted} needs {_INSTALL[wanted]}" if wanted == "TensorrtExecutionProvider" else ""
        without = "; optimization.cuda.graphs: false turns CUDA graphs off" if settings.graphs else ""
        raise ConfigError(
            f"ONNX Runtime cannot load {model_path}: {' '.join(str(error).split())}{needs}; if the file is damaged, "
            f"make it again with `{_maker(model_path)}`{without}"
        ) from error
    got = session.get_providers()[0]
    if got != wanted:
        raise ConfigError(
            f"{wanted} is asked for, but ONNX Runtime fell back to {got}: are its driver and libraries installed? "
            "ONNX Runtime's own log lines above name what is missing"
        )
    if settings.gpu is None:
        return session
    return BoundSession(session, settings.max_batch, device_id=settings.gpu, graphs=settings.graphs)


def check_settings(settings: SessionSettings) -> None:
    """Raises ConfigError for a provider or precision that this machine lacks."""
    available = onnxruntime.get_available_providers()
    for name, _ in settings.providers:
        if name not in available:
            raise ConfigError(
                f"{name} is asked for, but this onnxruntime {onnxruntime.__version__} has only "
                f"{', '.join(available)}: install {_INSTALL.get(name, name)}"
            )
    asked = (
        options.get("load_config", "")
        for providers in settings.parts or [settings.providers]
        for _, options in providers
    )
    if any('"bf16"' in config for config in asked) and not computes_bf16():
        raise ConfigError(
            "openvino_bf16 is asked for, but OpenVINO has no BF16 on this CPU: it needs AVX-512 or AVX2-VNNI-2, and "
            "would silently compute in FP32. Serve the default configuration, which is FP32"
        )


@functools.cache
def computes_bf16() -> bool:
    """Whether OpenVINO computes in BF16 on this CPU when asked to. If it cannot, it silently computes in FP32.

    It needs AVX-512 (F, BW, DQ and VL) or AVX2-VNNI-2. Linux does not list the latter in /proc/cpuinfo, so this
    multiplies two matrices and looks at the rounding.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(_ONE_PRODUCT, options, providers=[_openvino("bf16", 1)])
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), dtype=np.float32)
    (product,) = session.run(["c"], {"a": a, "b": b})
    return bool(np.abs(product - a @ b).max() > 1e-3)  # FP32 is off by 1e-5, BF16 by 1e-2


def _load_libraries(provider: str) -> None:
    """Load the provider's libraries from this environment's wheels, where the system's loader does not look."""
    if provider in _GPU_PROVIDERS:
        onnxruntime.preload_dlls()
    if provider == "TensorrtExecutionProvider":
        with contextlib.suppress(ImportError):  # the loader finds a system-wide TensorRT by itself
            importlib.import_module("tensorrt")


def _maker(model_path: Path) -> str:
    """The command that makes a file of this name: "model.fp16.onnx", "model.NAME.part2.onnx"."""
    words = model_path.name.split(".")[1:-1]
    if words and words[-1].startswith("part"):
        return f"clip-tools tune-precision --apply {words[0]}"
    return "clip-tools export-onnx" + (f" --precision {words[0]}" if words else "")


def check_contract(config: dict, session: onnxruntime.InferenceSession | SessionChain | BoundSession) -> None:
    """Raises ConfigError unless the graph's tensors match the configuration's names, types and dims."""
    batched = config.get("max_batch_size", 0) > 0
    for title, declared, found in (
        ("input", config["input"], session.get_inputs()),
        ("output", config["output"], session.get_outputs()),
    ):
        tensors = {tensor.name: tensor for tensor in found}
        for entry in declared:
            name, dims = entry["name"], [int(d) for d in entry["dims"]]
            if name not in tensors:
                raise ConfigError(f"{title} '{name}' is not in the graph, which has {', '.join(sorted(tensors))}")
            tensor = tensors[name]
            if tensor.type != _TENSOR_TYPES.get(entry["data_type"]):
                raise ConfigError(f"{title} '{name}': config.pbtxt says {entry['data_type']}, the graph {tensor.type}")
            graph_dims = list(tensor.shape[1:] if batched else tensor.shape)
            agree = len(graph_dims) == len(dims) and all(
                want in (have, -1) or not isinstance(have, int) for have, want in zip(graph_dims, dims, strict=True)
            )
            if not agree:
                raise ConfigError(f"{title} '{name}': config.pbtxt says dims {dims}, the graph {graph_dims}")
