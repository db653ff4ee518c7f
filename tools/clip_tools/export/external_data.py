"""ONNX external data: a graph's weights in a second file, because a protobuf message holds at most 2 GB."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from clip_tools.digest import data_path

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

LARGEST_BYTES = (1 << 31) - (16 << 20)  # of a graph in one file
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference reads them
_PAGE_BYTES = 4096  # ONNX Runtime maps the file into memory


def is_large(parameters: Iterable[Any], largest_bytes: int = LARGEST_BYTES) -> bool:
    """Whether a tower of these PyTorch parameters is too large for one file in FP32."""
    return sum(4 * int(parameter.numel()) for parameter in parameters) > largest_bytes


class DataFile:
    """The data file of a graph that is being written, as a context manager."""

    def __init__(self, graph: Path) -> None:
        self._location = data_path(graph).name
        self._file = data_path(graph).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, name: str, array: "npt.NDArray[Any]") -> "onnx.TensorProto":
        """A constant of the graph. A large one is written to the file, and the tensor refers to it."""
        from onnx import numpy_helper

        if array.nbytes < _INLINE_BYTES:
            return numpy_helper.from_array(array, name)
        tensor = numpy_helper.from_array(array[:0], name)
        tensor.dims[:] = array.shape
        self._point(tensor, array.data.cast("B"))
        return tensor

    def move(self, tensor: "onnx.TensorProto") -> None:
        """Move the data of a large tensor to the file."""
        if len(tensor.raw_data) >= _INLINE_BYTES:
            self._point(tensor, tensor.raw_data)

    def _point(self, tensor: "onnx.TensorProto", data: "bytes | memoryview") -> None:
        from onnx import TensorProto

        self._file.write(bytes(-self._file.tell() % _PAGE_BYTES))
        place = {"location": self._location, "offset": self._file.tell(), "length": len(data)}
        self._file.write(data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))


def save_graph(graph: "onnx.ModelProto", path: Path, largest_bytes: int = LARGEST_BYTES) -> None:
    """Write a graph to a file, or to two if it is too large for one; that takes the weights out of `graph`."""
    import onnx

    if graph.ByteSize() > largest_bytes:
        with DataFile(path) as data:
            for tensor in graph.graph.initializer:
                data.move(tensor)
    onnx.save(graph, str(path))


def load_graph(path: Path) -> "onnx.ModelProto":
    """The graph of a file, with its weights. Follows links first: `onnx` refuses external data behind a link."""
    import onnx

    return onnx.load(str(path.resolve()))


def load_nodes(path: Path) -> "onnx.ModelProto":
    """The graph of a file without its external data."""
    import onnx

    return onnx.load(str(path), load_external_data=False)
