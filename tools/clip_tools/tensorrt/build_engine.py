"""`clip-tools build-engine`: builds a TensorRT plan from the exported graph, and checks its precision.

The graph is strongly typed, so it alone decides the precision. The network's matrix multiplications are counted by
precision, and a plan of another precision than requested is not written.
"""

import datetime
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.gpu import Gpu, find_gpu
from clip_tools.paths import CACHE, MODELS
from clip_tools.repository import graph_name
from clip_tools.tensorrt.census import Census, count_engine, count_network
from clip_tools.tensorrt.plan_manifest import (
    PlanManifest,
    PlanOptions,
    plan_manifest_path,
    stale_reason,
)
from clip_tools.tensorrt.runtime import load_tensorrt

__all__ = ["PLAN_PATH", "PlanManifest", "PlanOptions", "build_engine", "default_onnx", "stale_reason"]

PLAN_PATH = MODELS / "clip_trt" / "1" / "model.plan"
TIMING = CACHE / "timing"
_INPUT, _OUTPUT = "pixels", "embedding"
_FP8_FROM = (8, 9)
_PARSER_ERRORS_SHOWN = 5


def default_onnx(precision: str, models: Path = MODELS) -> Path:
    """The exported graph of a precision: `model.onnx` for FP32, `model.fp16.onnx` and so on for the others."""
    return models / "clip_onnx" / "1" / graph_name(precision)


def build_engine(onnx_path: Path, output: Path, options: PlanOptions) -> PlanManifest:
    """Build the plan, check its precision, then put plan and manifest in place.

    Raises ToolError for a missing library or file, a graph that the parser refuses, and a network whose matrices do not
    run in `options.precision`. It then leaves the existing files alone.
    """
    if not 1 <= options.min_batch <= options.opt_batch <= options.max_batch:
        raise ToolError(
            f"expected 1 <= --min-batch <= --opt-batch <= --max-batch, got {options.min_batch}, {options.opt_batch}, "
            f"{options.max_batch}",
            exit_code=2,
        )
    trt = load_tensorrt(options.runtime)
    if not onnx_path.is_file():
        raise ToolError(
            f"{onnx_path} does not exist: make it with `clip-tools export-onnx --precision {options.precision}`"
        )
    gpu = find_gpu()
    if options.runtime == "tensorrt" and gpu is None:
        raise ToolError(
            "tensorrt builds on the GPU that will run the plan, and no GPU was found here; "
            "`--runtime tensorrt-rtx` builds without one, for RTX GPUs"
        )
    log = _log(trt)
    # TensorRT holds a lock while it calls the logger. If Python freed an earlier builder there, it would wait for that
    # lock forever.
    gc.collect()
    with log.explaining():
        builder = trt.Builder(log)
        network, _parser = _parse(trt, builder, log, onnx_path)
        census = count_network(network, trt)
        if mismatch := census.mismatch(options.precision):
            raise ToolError(
                f"{onnx_path}: {mismatch}; nothing was written. The graph decides the precision: "
                f"`clip-tools export-onnx --precision {options.precision}` makes one"
            )
        row = tuple(network.get_input(0).shape)[1:]
        config, targets = _configure(trt, builder, options, gpu, row)
        started = time.monotonic()
        with _progress(trt, config):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ToolError(f"{onnx_path}: {options.runtime} {trt.__version__} built no engine: {log.reason()}")
        build_s = time.monotonic() - started
    _keep_timing(trt, config, options, gpu)
    return _write(
        bytes(plan), onnx_path, output, options, trt=trt, gpu=gpu, targets=targets, census=census, build_s=build_s
    )


def _log(trt: Any) -> Any:
    """A logger that collects the errors for our message and drops everything else."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU each error is followed by one about the driver, which is not the reason.
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "CUDA driver version" not in message:
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            return self.errors[0][:400] if self.errors else "it gave no reason"

        @contextmanager
        def explaining(self) -> Iterator[None]:
            try:
                yield
            except (RuntimeError, TypeError) as error:  # pybind11's errors for a C++ object that could not be made
                raise ToolError(f"TensorRT failed: {error}: {self.reason()}") from error

    return Log()


def _parse(trt: Any, builder: Any, log: Any, onnx_path: Path) -> tuple[Any, Any]:
    """(The graph's strongly typed network, its parser, which owns the weights). Raises ToolError for other tensors."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(flag) if flag is not None else 0)  # newer versions lack it
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path.resolve())):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        shown = "; ".join(_parser_error(error) for error in found[:_PARSER_ERRORS_SHOWN]) or log.reason()
        more = f" (and {len(found) - _PARSER_ERRORS_SHOWN} more)" if len(found) > _PARSER_ERRORS_SHOWN else ""
        raise ToolError(
            f"{onnx_path}: TensorRT's parser refuses {shown}{more}. Export it again with `clip-tools export-onnx`; in "
            "a graph of your own, replace these nodes or use a newer TensorRT"
        )
    _let_attention_be_decomposed(trt, network)
    tensors = {
        "input": [network.get_input(index) for index in range(network.num_inputs)],
        "output": [network.get_output(index) for index in range(network.num_outputs)],
    }
    expected = {"input": (_INPUT, "UINT8"), "output": (_OUTPUT, "FLOAT")}
    for title, found in tensors.items():
        got = [(tensor.name, tensor.dtype.name) for tensor in found]
        if got != [expected[title]]:
            raise ToolError(f"{onnx_path}: expected the one {title} {expected[title]}, got {got}")
    shape = tuple(tensors["input"][0].shape)
    if len(shape) != 4 or min(shape[1:]) < 1 or shape[3] != 3:
        raise ToolError(f"{onnx_path}: expected pixels of shape (N, side, side, 3), got {shape}")
    return network, parser


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Allow decomposed attention: else the build fails if the GPU has no kernel for the type and head width."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's Python API has no other cast
            layer.attention.decomposable = True


def _parser_error(error: Any) -> str:
    reason = " ".join(str(error.desc()).split())
    reason = reason.split("[checkMacros")[0].strip()
    return f"node '{error.node_name()}' ({error.node_operator()}): {reason[:300]}"


def _configure(
    trt: Any, builder: Any, options: PlanOptions, gpu: Gpu | None, row: tuple[int, ...]
) -> tuple[Any, tuple[str, ...]]:
    """(The builder's configuration, the compute capabilities to build for ahead of time; none: this GPU)."""
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(_INPUT, *((batch, *row) for batch in (options.min_batch, options.opt_batch, options.max_batch)))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector reports no types
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it is FP32 with FP16's mantissa
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.runtime == "tensorrt-rtx":
        if options.hardware_compatible:
            raise ToolError(
                "--hardware-compatible is for tensorrt; tensorrt-rtx builds for every --target", exit_code=2
            )
        return config, _aim(trt, config, options)
    if options.targets:
        raise ToolError("--target is for tensorrt-rtx; tensorrt builds for this machine's GPU", exit_code=2)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    path = _timing_path(trt, options, gpu)
    config.set_timing_cache(
        config.create_timing_cache(path.read_bytes() if path.is_file() else b""), ignore_mismatch=False
    )
    return config, ()


def _aim(trt: Any, config: Any, options: PlanOptions) -> tuple[str, ...]:
    """Set and return the compute capabilities to build for; by default all from Ampere on that have the precision."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }

    def numbers(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    least = _FP8_FROM if options.precision == "fp8" else (7, 5)
    targets = options.targets or tuple(name for name in known if numbers(name) >= max(least, (8, 0)))
    for target in targets:
        if target not in known or numbers(target) < least:
            usable = ", ".join(name for name in known if numbers(name) >= least)
            raise ToolError(
                f"--target {target}: tensorrt-rtx {trt.__version__} builds {options.precision} for {usable}",
                exit_code=2,
            )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(known[target], index)
    return targets


def _timing_path(trt: Any, options: PlanOptions, gpu: Gpu | None) -> Path:
    """The timing cache of this library version and GPU; timings are valid for no other."""
    where = f"{gpu.name}-{gpu.compute_capability}".replace(" ", "_") if gpu else "no-gpu"
    return TIMING / f"{options.runtime}-{trt.__version__}-{where}.bin"


def _keep_timing(trt: Any, config: Any, options: PlanOptions, gpu: Gpu | None) -> None:
    cache = config.get_timing_cache() if options.runtime == "tensorrt" else None
    if cache is None:  # tensorrt-rtx times nothing at build time
        return
    path = _timing_path(trt, options, gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(bytes(cache.serialize()))
    Path(file.name).replace(path)


@contextmanager
def _progress(trt: Any, config: Any) -> Iterator[None]:
    """Show the phases of the build on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, shown: Progress) -> None:
            trt.IProgressMonitor.__init__(self)
            self.shown = shown
            self.tasks: dict[str, Any] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.tasks[phase] = self.shown.add_task(phase, total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self.shown.update(self.tasks[phase], completed=step + 1)
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            self.shown.remove_task(self.tasks.pop(phase))

    with Progress(console=Console(stderr=True), transient=True) as shown:
        monitor = Monitor(shown)  # it must live as long as the config uses it
        config.progress_monitor = monitor
        try:
            yield
        finally:
            config.progress_monitor = None


def _write(
    plan: bytes,
    onnx_path: Path,
    output: Path,
    options: PlanOptions,
    *,
    trt: Any,
    gpu: Gpu | None,
    targets: tuple[str, ...],
    census: Census,
    build_s: float,
) -> PlanManifest:
    from clip_tools.export.manifest import put_in_place

    source = _onnx_manifest(onnx_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        draft = Path(folder) / output.name
        draft.write_bytes(plan)
        manifest = PlanManifest(
            sha256=sha256_of(draft),
            onnx=onnx_path.name,
            onnx_sha256=sha256_of(onnx_path),
            runtime_version=trt.__version__,
            cuda=gpu.cuda if gpu else None,
            gpu=gpu.name if gpu and not targets else None,
            compute_capability=gpu.compute_capability if gpu and not targets else None,
            **{**asdict(options), "targets": targets},
            matrices=dict(census.matrices),
            weights=dict(census.weights),
            build_s=round(build_s, 2),
            size_bytes=len(plan),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            engine_layers=_inspect(trt, plan) if gpu else {},
            model=source.get("model"),
            trained=source.get("trained"),
        )
        put_in_place(draft, manifest, output, plan_manifest_path(output))
    return manifest


def _onnx_manifest(onnx_path: Path) -> dict[str, Any]:
    """The content of the graph's manifest; empty if it has none."""
    from clip_tools.export.manifest import manifest_path

    try:
        found = json.loads(manifest_path(onnx_path).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("sha256") == sha256_of(onnx_path) else {}


def _inspect(trt: Any, plan: bytes) -> dict[str, int]:
    """The inspector's layer types of the built engine; empty if this GPU cannot load it."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    return count_engine(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def census_table(manifest: PlanManifest) -> Any:
    """The matrix multiplications by precision, as a rich table."""
    from rich.table import Table

    table = Table(title=f"Matrix multiplications in {manifest.precision}", title_justify="left")
    for title in ("precision", "multiplications", "weights"):
        table.add_column(title, justify="left" if title == "precision" else "right")
    for name, count in manifest.matrices.items():
        table.add_row(name, str(count), f"{manifest.weights.get(name, 0):,}")
    return table
