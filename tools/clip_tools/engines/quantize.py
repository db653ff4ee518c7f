"""An FP32 graph with explicit Q/DQ pairs around its linear layers, in INT8 or FP8.

Static and symmetric, one scale for a layer's activations and, in INT8, one for each output channel of its weights:
what TensorRT's eight-bit kernels take. Plain INT8 ranges lose this model (cosine 0.63 was seen), so before rounding

- each input channel is shifted to the middle of its range (Outlier Suppression+, arXiv:2304.09145) and
- what makes its range wide is moved into the weights (SmoothQuant, arXiv:2211.10438),
- both chosen for each layer by the error of its product on calibration rows, and
- the mean error that remains goes into the bias (arXiv:1906.04721).

All three are exact but for rounding. The patch embedding, attention's own products and the last projection stay as
they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.engines.precision import Graph, fold_normalisation, split_gemm

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Floats = npt.NDArray[np.float32]

Eight = Literal["int8", "fp8"]

_INT8_MAX, _FP8_MAX = 127.0, 448.0
# Tried for each layer; the best product wins. One alone: 0.5 gave B-16 a mean cosine of 0.9878, 0.7 0.9887.
_SMOOTHINGS = (0.4, 0.55, 0.7, 0.85)


@dataclass(frozen=True)
class LayerStatistics:
    """What came into a linear layer: (K,) least and largest of each channel, and (R, K) rows as a sample."""

    least: "Floats"
    largest: "Floats"
    rows: "Floats"


@dataclass(frozen=True)
class LayerScales:
    """How a layer is quantised: `(x - shift) / smooth` is rounded to multiples of `scale`; `bias` is added after it.

    `shift` and `smooth` are (K,), `weight_scales` (N,) or (), `bias` (N,), all float32; scales are exact in FP16.
    """

    shift: "Floats"
    smooth: "Floats"
    scale: float
    weight_scales: "Floats"
    bias: "Floats"


def prepare(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph in the form that is calibrated and quantised: one form of linear layer, pixels folded."""
    return split_gemm(fold_normalisation(model))


def linear_layers(model: "onnx.ModelProto") -> list[Any]:
    """The nodes that multiply by a weight inside the transformer, in order: all but the last, the projection."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    nodes = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    return nodes[:-1]


def fit(statistics: LayerStatistics, weight: "Floats", kind: Eight) -> LayerScales:
    """The scales of one layer; `weight` is (K, N). Chosen by the squared error of the product over the rows."""
    import numpy as np

    wide, rows = weight.astype(np.float32), statistics.rows
    exact = rows @ wide
    best: tuple[float, LayerScales] | None = None
    for shift, smooth in _candidates(statistics, wide, kind):
        largest = float((np.maximum(statistics.largest - shift, shift - statistics.least) / smooth).max())
        moved = wide * smooth[:, None]
        levels = _INT8_MAX if kind == "int8" else _FP8_MAX
        weight_scales = _half(np.abs(moved).max(axis=0 if kind == "int8" else None).clip(1e-7) / levels)
        rounded = _round(moved, weight_scales, kind)
        # The whole range, outliers too: a clipped one is rare among the rows, and costs an image its neighbours.
        scale = float(_half(np.asarray(max(largest, 1e-6) / levels)))
        error = exact - shift @ wide - _round((rows - shift) / smooth, np.float32(scale), kind) @ rounded
        loss = float(((error - error.mean(axis=0)) ** 2).mean())
        if best is None or loss < best[0]:
            bias = shift @ wide + error.mean(axis=0)
            best = loss, LayerScales(shift, smooth, scale, weight_scales, bias)
    assert best is not None  # noqa: S101
    return best[1]


def quantize(model: "onnx.ModelProto", layers: Mapping[str, LayerScales], kind: Eight) -> "onnx.ModelProto":
    """A prepared FP32 graph with Q/DQ pairs in FP32 at these layers; `precision.lower` makes the rest FP16."""
    import numpy as np
    from onnx import TensorProto, helper

    graph = Graph(model)
    zero = graph.add_constant("zero_int8", np.zeros((), np.int8))
    if kind == "fp8":
        zero = "zero_fp8"
        graph.constants[zero] = helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = []
    for node in graph.nodes:
        if node.name not in layers:
            nodes.append(node)
            continue
        layer, name = layers[node.name], node.name
        weight = graph.array(node.input[1]) * layer.smooth[:, None]
        data = node.input[0]
        if layer.shift.any():
            graph.add_constant(f"{name}.shift", layer.shift)
            nodes.append(helper.make_node("Sub", [data, f"{name}.shift"], [f"{name}.centred"], name=f"{name}.sub"))
            data = f"{name}.centred"
        if (layer.smooth != 1).any():
            graph.add_constant(f"{name}.smooth", 1 / layer.smooth)
            nodes.append(helper.make_node("Mul", [data, f"{name}.smooth"], [f"{name}.even"], name=f"{name}.mul"))
            data = f"{name}.even"
        graph.add_constant(f"{name}.scale", np.asarray(layer.scale, np.float32))
        graph.add_constant(f"{name}.weight_scale", layer.weight_scales)
        graph.constants[f"{name}.weight"] = _eight_bit_tensor(f"{name}.weight", weight, layer.weight_scales, kind)
        axis: dict[str, Any] = {"axis": 1} if layer.weight_scales.ndim else {}
        nodes += [
            helper.make_node("QuantizeLinear", [data, f"{name}.scale", zero], [f"{name}.q"], name=f"{name}.quantize"),
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", f"{name}.scale", zero], [f"{name}.dq"], name=f"{name}.dequantize"
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.weight", f"{name}.weight_scale"],
                [f"{name}.weight_dq"],
                name=f"{name}.weight_dequantize",
                **axis,
            ),
            helper.make_node("MatMul", [f"{name}.dq", f"{name}.weight_dq"], [f"{name}.product"], name=name),
        ]
        graph.add_constant(f"{name}.bias", layer.bias)
        nodes.append(
            helper.make_node("Add", [f"{name}.product", f"{name}.bias"], list(node.output), name=f"{name}.add")
        )
    graph.nodes = nodes
    return graph.finish()


def _candidates(statistics: LayerStatistics, weight: Any, kind: Eight) -> "list[tuple[Any, Any]]":
    """(shift, smooth) pairs to try; FP8 has exponents of its own and needs neither."""
    import numpy as np

    channels = len(weight)
    if kind == "fp8":
        return [(np.zeros(channels, np.float32), np.ones(channels, np.float32))]
    middle = (statistics.least + statistics.largest) / 2
    reach = np.maximum(statistics.largest - middle, middle - statistics.least).clip(1e-5)
    column = np.abs(weight).max(axis=1).clip(1e-5)
    found = []
    for strength in _SMOOTHINGS:
        smooth = reach**strength / column ** (1 - strength)
        found.append((middle, np.asarray(smooth / np.exp(np.log(smooth).mean()), np.float32)))
    return found


def _half(value: Any) -> Any:
    """Rounded to FP16, which the scales are in the finished graph; never zero."""
    import numpy as np

    return np.maximum(value.astype(np.float16), np.float16(1e-7)).astype(np.float32)


def _round(values: Any, scale: Any, kind: Eight) -> Any:
    """The values as the eight-bit type holds them."""
    import ml_dtypes
    import numpy as np

    steps = values / scale
    if kind == "int8":
        return np.clip(np.rint(steps), -_INT8_MAX - 1, _INT8_MAX) * scale
    return np.clip(steps, -_FP8_MAX, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def _eight_bit_tensor(name: str, weight: Any, scale: Any, kind: Eight) -> Any:
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    steps = weight.astype(np.float64) / scale.astype(np.float64)
    if kind == "int8":
        return numpy_helper.from_array(np.clip(np.rint(steps), -_INT8_MAX, _INT8_MAX).astype(np.int8), name)
    low = np.clip(steps, -_FP8_MAX, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, low.shape, low.tobytes(), raw=True)
