"""Runs a plan on a GPU: one engine, execution context and stream, and buffers for the largest batch.

If the configuration enables CUDA graphs (`optimization.cuda`), each batch size in `graph_spec` is captured when the
plan is loaded. A batch is then padded to the next larger captured size.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from trt_contract import PlanError, check_contract, plan_tensors

_NUMPY_TYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_INT8": np.int8,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
}


class CudaError(RuntimeError):
    """A CUDA call failed, so the buffers' contents are undefined. If the driver was lost, the next call fails too."""


class Cuda:
    """The CUDA runtime calls that a plan needs, on one device. Each raises CudaError on failure."""

    def __init__(self, device_id: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise PlanError("cuda-bindings is not installed here: pip install cuda-bindings") from None
        self._runtime, self._device_id = runtime, device_id
        try:
            self.use_device()
        except (CudaError, RuntimeError) as error:
            raise PlanError(
                f"GPU {device_id} cannot be used: {error}: is the NVIDIA driver installed and new enough?"
            ) from None

    def _call(self, name: str, *arguments):
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            raise CudaError(f"{name}: {error.name}")
        return values[0] if values else None

    def use_device(self) -> None:
        """Make the device current for the calling thread."""
        self._call("cudaSetDevice", self._device_id)

    def new_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def allocate(self, size_bytes: int) -> int:
        """Allocate memory on the device and return its address."""
        return int(self._call("cudaMalloc", size_bytes))

    def allocate_pinned(self, size_bytes: int) -> int:
        """Allocate page-locked host memory, the only kind that copies asynchronously, and return its address."""
        return int(self._call("cudaMallocHost", size_bytes))

    def copy_in(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        """Copy from host to device, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size_bytes, kind, stream)

    def copy_out(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        """Copy from device to host, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size_bytes, kind, stream)

    def wait_for(self, stream: int) -> None:
        """Wait until all work in the stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> object:
        """Capture the work that `enqueue` submits as a graph, without running it."""
        modes = self._runtime.cudaStreamCaptureMode
        self._call("cudaStreamBeginCapture", stream, modes.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        finally:
            graph = self._call("cudaStreamEndCapture", stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: object, stream: int) -> None:
        """Run a captured graph, in stream order."""
        self._call("cudaGraphLaunch", graph, stream)

    def free(self, stream: int, device: list[int], pinned: list[int]) -> None:
        """Destroy the stream and free the memory."""
        self._call("cudaStreamDestroy", stream)
        for address in device:
            self._call("cudaFree", address)
        for address in pinned:
            self._call("cudaFreeHost", address)


class Buffer:
    """A tensor's memory for the largest batch: on the device, and pinned on the host, where `array` is a view of it."""

    def __init__(self, cuda: Cuda, entry: dict, max_batch: int) -> None:
        shape = (max_batch, *(int(size) for size in entry["dims"]))
        dtype = np.dtype(_NUMPY_TYPES[entry["data_type"]])
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        self.name = entry["name"]
        self.host, self.device = cuda.allocate_pinned(size_bytes), cuda.allocate(size_bytes)
        memory = (ctypes.c_ubyte * size_bytes).from_address(self.host)
        self.array = np.frombuffer(memory, dtype).reshape(shape)
        self.row_bytes = size_bytes // max_batch


class PlanRunner:
    """Runs batches of at most `max_batch_size`, one at a time: each model instance has its own runner."""

    def __init__(self, plan: Path, config: dict, *, trt: ModuleType, cuda: Cuda) -> None:
        """Raises PlanError if the plan is missing, does not fit this TensorRT or GPU, or does not match the config."""
        if not plan.is_file():
            raise PlanError(f"{plan} is missing: make it with `clip-tools build-engine`")
        self._cuda, self._max_batch = cuda, config["max_batch_size"]
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise PlanError(
                f"{plan.name} does not load in {trt.__name__} {trt.__version__} on this GPU. A plan loads only in "
                "the version and on the GPU that it was built for: rebuild it with `clip-tools build-engine`"
            )
        check_contract(config, plan_tensors(engine, trt))
        self._runtime, self._engine = runtime, engine  # they must outlive the context
        graphs = (config.get("optimization") or {}).get("cuda") or {}
        sizes = [int(spec["batch_size"]) for spec in graphs.get("graph_spec") or []] if graphs.get("graphs") else []
        # TensorRT for RTX captures graphs itself. It compiles a shape at first use, which would break our capture.
        captures_itself = bool(sizes) and hasattr(trt, "CudaGraphStrategy")
        self._context = engine.create_execution_context(*([_rtx_graphs(engine, trt)] if captures_itself else []))
        if self._context is None:
            raise PlanError(f"no execution context for {plan.name}: is the GPU's memory full?")
        self._stream = cuda.new_stream()
        self._inputs = [Buffer(cuda, entry, self._max_batch) for entry in config["input"]]
        self._outputs = [Buffer(cuda, entry, self._max_batch) for entry in config["output"]]
        for buffer in (*self._inputs, *self._outputs):
            self._context.set_tensor_address(buffer.name, buffer.device)
        self._graphs = {size: self._ready(size, captures_itself) for size in sorted(sizes)}

    def _ready(self, size: int, captures_itself: bool) -> object | None:
        """The CUDA graph of a batch size, after one run; None if TensorRT keeps the graph. Raises PlanError."""
        try:
            self._enqueue(size)  # a shape's first run sets TensorRT up and cannot be captured
            graph = None if captures_itself else self._cuda.capture(self._stream, lambda: self._enqueue(size))
            self._run(size, graph)
            self._cuda.wait_for(self._stream)
        except CudaError as error:
            raise PlanError(
                f"a batch of {size} cannot be captured as a CUDA graph: {error}; "
                "`optimization { cuda { graphs: false } }` turns graphs off"
            ) from error
        return graph

    def run(self, columns: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        """The outputs by name, (sum of the rows, *dims), for a list of arrays for each input.

        The returned arrays are views of pinned memory, and the next call overwrites them. Raises ValueError for arrays
        of a wrong shape, type or number, CudaError if the device fails.
        """
        counts = {name: sum(len(array) for array in arrays) for name, arrays in columns.items()}
        rows = counts[self._inputs[0].name]
        if not 1 <= rows <= self._max_batch or len(set(counts.values())) != 1:
            raise ValueError(f"expected batches of one size, 1 to {self._max_batch}; got {counts}")
        self._cuda.use_device()
        for buffer in self._inputs:
            _gather(columns[buffer.name], buffer)
            self._cuda.copy_in(buffer.device, buffer.host, rows * buffer.row_bytes, self._stream)
        # Padding rows hold data of an earlier batch; they do not affect the other rows.
        size = next((size for size in self._graphs if rows <= size), rows)
        self._run(size, self._graphs.get(size))
        for buffer in self._outputs:
            self._cuda.copy_out(buffer.host, buffer.device, rows * buffer.row_bytes, self._stream)
        self._cuda.wait_for(self._stream)
        return {buffer.name: buffer.array[:rows] for buffer in self._outputs}

    def _run(self, size: int, graph: object | None) -> None:
        if graph is None:
            self._enqueue(size)
        else:
            self._cuda.launch(graph, self._stream)

    def _enqueue(self, size: int) -> None:
        for buffer in self._inputs:
            if not self._context.set_input_shape(buffer.name, (size, *buffer.array.shape[1:])):
                raise CudaError(f"the plan's profile refuses a batch of {size}")
        if not self._context.execute_async_v3(self._stream):
            raise CudaError("the plan's execution could not be started; the server's log has TensorRT's reason")

    def close(self) -> None:
        """Free the device's and the pinned memory."""
        buffers = (*self._inputs, *self._outputs)
        self._context = None
        self._cuda.free(self._stream, [buffer.device for buffer in buffers], [buffer.host for buffer in buffers])


def _rtx_graphs(engine, trt: ModuleType):
    """A runtime config with TensorRT for RTX's own CUDA graphs; each shape's kernels compile in its first run."""
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return config


def _gather(arrays: list[np.ndarray], buffer: Buffer) -> None:
    """Copy the rows of all arrays, one after another, into the pinned buffer."""
    start = 0
    for array in arrays:
        if array.shape[1:] != buffer.array.shape[1:] or array.dtype != buffer.array.dtype:
            raise ValueError(
                f"'{buffer.name}': expected {buffer.array.dtype} {buffer.array.shape[1:]} a row, "
                f"got {array.dtype} {array.shape[1:]}"
            )
        buffer.array[start : start + len(array)] = array
        start += len(array)
