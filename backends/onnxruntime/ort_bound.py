"""A session with preallocated tensors on its device. Each batch is padded to one of a few sizes.

A CUDA graph needs this: every run has the same shapes at the same addresses.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

_NUMPY_TYPES = {
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
}


class ConfigError(ValueError):
    """The configuration asks for something that this backend or this machine does not have."""


def bucket_sizes(max_batch: int) -> list[int]:
    """The batch sizes that are run: the powers of two below `max_batch`, and `max_batch` itself."""
    return [2**power for power in range((max_batch - 1).bit_length())] + [max_batch]


@dataclass(frozen=True)
class _Bucket:
    """The tensors of one batch size by name, with their binding and run options."""

    inputs: dict[str, onnxruntime.OrtValue]
    outputs: dict[str, onnxruntime.OrtValue]
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions


class BoundSession:
    """Runs batches of 1 to `max_batch`, one at a time, in the thread that created it.

    ONNX Runtime keeps CUDA graphs per thread. The constructor runs every size. Padding rows hold data of an earlier
    batch; they do not affect the other rows and are never returned.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        max_batch: int,
        *,
        device: str = "cuda",
        device_id: int = 0,
        graphs: bool = False,
    ) -> None:
        """`graphs` captures each size as a CUDA graph. Raises ConfigError if a size cannot run."""
        if max_batch < 1:
            raise ConfigError(
                f"max_batch_size: expected 1 or more on a GPU, because tensors are allocated for it; got {max_batch}"
            )
        self._session, self._max_batch, self._graphs = session, max_batch, graphs
        self._device, self._device_id = device, device_id
        self._rows = {tensor.name: _row(tensor) for tensor in (*session.get_inputs(), *session.get_outputs())}
        self._outputs = [tensor.name for tensor in session.get_outputs()]
        self._where = f"GPU {device_id}" if device == "cuda" else "the CPU"
        sizes = bucket_sizes(max_batch)
        try:
            self._hosts = {tensor.name: self._host_memory(tensor.name) for tensor in session.get_inputs()}
            self._buckets = {size: self._bind(size) for size in sizes}
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self._where} has no room for the tensors of batches of 1 to {max_batch}: {_line(error)}: free its "
                "memory, or lower max_batch_size"
            ) from error
        for size in reversed(sizes):  # the largest first, so that the others reuse its memory
            self._warm_up(size)

    def _host_memory(self, name: str) -> np.ndarray:
        """The array in which an input's batch is assembled; page-locked on a GPU, which copies from it directly."""
        dims, dtype = self._rows[name]
        shape = (self._max_batch, *dims)
        if self._device == "cuda":
            return _page_locked(shape, dtype, self._device_id)
        return np.zeros(shape, dtype)

    def _bind(self, size: int) -> _Bucket:
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type((size, *dims), dtype, self._device, self._device_id)
            for name, (dims, dtype) in self._rows.items()
        }
        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        for name, value in values.items():
            if name in self._hosts:
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_ortvalue_output(name, value)
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(size))  # ONNX Runtime uses 0 itself
        return _Bucket(
            {name: values[name] for name in self._hosts},
            {name: values[name] for name in self._outputs},
            binding,
            options,
        )

    def _warm_up(self, size: int) -> None:
        try:
            for _ in range(2):  # the first run captures the graph, the second replays it
                self._run(size)
        except Exception as error:
            why = (
                ", or cannot be captured as a CUDA graph; `optimization { cuda { graphs: false } }` turns graphs off"
                if self._graphs
                else ""
            )
            raise ConfigError(f"a batch of {size} does not run on {self._where}{why}: {_line(error)}") from error

    def _run(self, size: int) -> _Bucket:
        bucket = self._buckets[size]
        for name, value in bucket.inputs.items():
            value.update_inplace(self._hosts[name][:size])
        self._session.run_with_iobinding(bucket.binding, bucket.options)
        bucket.binding.synchronize_outputs()
        return bucket

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray | list[np.ndarray]]) -> list[np.ndarray]:
        """The outputs of these names, as from `InferenceSession.run`. An input may be a list of arrays to join.

        Raises ValueError for arrays of a wrong shape, type or number.
        """
        columns = {name: [given] if isinstance(given, np.ndarray) else given for name, given in feeds.items()}
        counts = {name: sum(len(array) for array in arrays) for name, arrays in columns.items()}
        rows = next(iter(counts.values()), 0)
        if set(counts) != set(self._hosts) or len(set(counts.values())) != 1 or not 1 <= rows <= self._max_batch:
            raise ValueError(
                f"expected batches of one size, 1 to {self._max_batch}, of {', '.join(self._hosts)}; got {counts}"
            )
        for name, arrays in columns.items():
            _gather(name, arrays, self._hosts[name])
        bucket = self._run(next(size for size in self._buckets if rows <= size))
        # Copy: on a CPU `numpy()` is a view, and the next run overwrites it.
        return [bucket.outputs[name].numpy()[:rows].copy() for name in names]

    def get_inputs(self) -> list:
        """The graph's inputs."""
        return self._session.get_inputs()

    def get_outputs(self) -> list:
        """The graph's outputs."""
        return self._session.get_outputs()

    def get_providers(self) -> list[str]:
        """The session's providers."""
        return self._session.get_providers()

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The providers' options."""
        return self._session.get_provider_options()


def _row(tensor: onnxruntime.NodeArg) -> tuple[list[int], np.dtype]:
    """(dims without the batch, dtype) of a graph's tensor."""
    dims = list(tensor.shape[1:])
    if tensor.type not in _NUMPY_TYPES or not tensor.shape or not all(isinstance(size, int) for size in dims):
        raise ConfigError(
            f"'{tensor.name}' is {tensor.type} {tensor.shape}: on a GPU only the batch may be dynamic, and the "
            f"type must be one of {', '.join(_NUMPY_TYPES)}"
        )
    return dims, np.dtype(_NUMPY_TYPES[tensor.type])


def _page_locked(shape: Sequence[int], dtype: np.dtype, device_id: int) -> np.ndarray:
    """An array in page-locked memory that is never freed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise ConfigError("cuda-bindings is not installed here: pip install cuda-bindings (extra `gpu`)") from None
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    (error,) = runtime.cudaSetDevice(device_id)
    if not int(error):
        error, address = runtime.cudaMallocHost(size_bytes)
    if int(error):
        raise RuntimeError(error.name)
    return np.frombuffer((ctypes.c_ubyte * size_bytes).from_address(int(address)), dtype).reshape(shape)


def _gather(name: str, arrays: list[np.ndarray], host: np.ndarray) -> None:
    """Copy the rows of all arrays, one after another, to the start of `host`."""
    start = 0
    for array in arrays:
        if array.shape[1:] != host.shape[1:] or array.dtype != host.dtype:
            raise ValueError(
                f"'{name}': expected {host.dtype} {host.shape[1:]} a row, got {array.dtype} {array.shape[1:]}"
            )
        host[start : start + len(array)] = array
        start += len(array)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
