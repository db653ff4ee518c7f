"""Puts explicit Q/DQ pairs around the linear layers of an FP32 graph, in INT8 or FP8.

Quantisation is symmetric, with one constant scale for a layer's activations and, in INT8, one for each output channel
of its weights, as TensorRT's eight-bit kernels require. Plain INT8 ranges break this model (cosine 0.63 was seen), so

- in INT8 the residual stream is rotated, so that no channel is an outlier (rotation.py);
- each token's mean over the images is subtracted first, if a layer's input tells tokens apart, and added in the bias.
  The class token, which alone becomes the embedding, keeps only a quarter to a hundredth of its size to be rounded;
- each row is divided by its largest number before rounding and its product multiplied by it, so that every row uses all
  levels and none is clipped, whatever the image;
- the weights are fitted to the rounded inputs, then rounded so that later ones correct earlier ones (gptq.py);
- the mean of the remaining error goes into the bias (arXiv:1906.04721).

The patch embedding, the products inside attention, the rotation, the last projection and the layers that only the class
token passes are not quantised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.errors import ToolError
from clip_tools.export.precision import Graph, fold_normalisation, split_gemm
from clip_tools.export.vit_graph import PATCH_EMBEDDING
from clip_tools.quantization.gptq import curvature, fit_weights, round_weights
from clip_tools.quantization.rotation import ROTATION, rotate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Floats = npt.NDArray[np.float32]

EightBit = Literal["int8", "fp8"]

_TOP: dict[EightBit, float] = {"int8": 127.0, "fp8": 448.0}
_LEAST = 1e-6  # lowest divisor of a row: the first layer's class token is the same in all images, so its row is zero
_NEGLIGIBLE = 1e-4  # share of the rows' usual length; shorter ones are rounding noise


@dataclass(frozen=True)
class LayerStatistics:
    """The input of a linear layer: each token's mean over the images, and `x - centre` of some rows, (R, K).

    `centre` broadcasts against the layer's input: (T, 1, K), (1, T, K), or (1, K) if tokens cannot be told apart.
    """

    centre: "Floats"
    rows: "Floats"


@dataclass(frozen=True)
class QuantisedLayer:
    """A linear layer in eight bits: each row of `x - centre` is divided by its largest number and rounded.

    `centre` (..., K) is that of `LayerStatistics`. The product is multiplied by its row's divisor, and `bias` (..., N)
    is added. `weight_scales` are (N,) or (), float32 and exact in FP16. `levels` are the (K, N) weights in multiples of
    their scale: int8, or float8_e4m3fn's bits as int8.
    """

    centre: "Floats"
    weight_scales: "Floats"
    levels: "npt.NDArray[np.int8]"
    bias: "Floats"


def prepare(model: "onnx.ModelProto", kind: EightBit) -> "onnx.ModelProto":
    """The graph to calibrate and quantise: all linear layers in one form, the normalisation folded.

    For INT8 its residual stream is rotated; FP8 is floating point and tolerates outlier channels.
    """
    prepared = split_gemm(fold_normalisation(model))
    return rotate(prepared) if kind == "int8" else prepared


def linear_layers(model: "onnx.ModelProto") -> list[Any]:
    """The nodes that multiply by a weight inside the transformer, in order: without patch embedding and projection."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    nodes = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights - {ROTATION}]
    return [node for node in nodes[:-1] if node.name != PATCH_EMBEDDING]


def fit(statistics: LayerStatistics, weight: "Floats", kind: EightBit) -> QuantisedLayer:
    """One layer in eight bits, fitted by the product's squared error relative to each row's size; `weight` is (K, N).

    Otherwise the few tokens that are very large in a ViT would hide the errors of all others. Rows equal to the centre
    are skipped: the first layer's class token, and what is white in every image. Raises ToolError if no row remains.
    """
    import numpy as np

    wide, rows = weight.astype(np.float32), statistics.rows
    length = np.linalg.norm(rows, axis=1)
    rows = rows[length > _NEGLIGIBLE * np.sqrt(np.mean(length**2))]
    if not len(rows):
        raise ToolError("the images to calibrate on are all the same: give different ones")
    size = np.linalg.norm(rows @ wide, axis=1)
    shares = (1 / np.maximum(size, 0.1 * np.median(size)))[:, None].astype(np.float32)
    seen = _round(rows, kind)
    curved = curvature(seen * shares)
    moved = fit_weights(wide, rows * shares, seen * shares, curved)
    weight_scales = _weight_scales(moved, kind)
    levels = round_weights(moved / weight_scales, curved, lambda steps: _to_grid(steps, kind))
    error = np.average(rows @ wide - seen @ (levels * weight_scales), axis=0, weights=shares[:, 0] ** 2)
    bias = statistics.centre @ wide + error.astype(np.float32)
    return QuantisedLayer(statistics.centre, weight_scales, _bits(levels, kind), bias)


def quantize(model: "onnx.ModelProto", layers: Mapping[str, QuantisedLayer], kind: EightBit) -> "onnx.ModelProto":
    """A prepared FP32 graph with Q/DQ pairs in FP32 at these layers; `precision.lower` makes the rest FP16."""
    import numpy as np
    from onnx import TensorProto, helper

    graph = Graph(model)
    zero = graph.add_constant("zero_int8", np.zeros((), np.int8))
    if kind == "fp8":
        zero = "zero_fp8"
        graph.constants[zero] = helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    scale = graph.add_constant("unit_scale", _unit_scale(kind))
    last_axis = graph.add_constant("last_axis", np.array([-1]))
    least = graph.add_constant("least_size", np.asarray(_LEAST, np.float32))
    nodes: list[onnx.NodeProto] = []

    def add(made: str, operator: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [made], name=made, **attributes))
        return made

    for node in graph.nodes:
        if node.name not in layers:
            nodes.append(node)
            continue
        layer, name, data = layers[node.name], node.name, node.input[0]
        data = add(f"{name}.centred", "Sub", [data, graph.add_constant(f"{name}.centre", layer.centre)])
        largest = add(f"{name}.largest", "ReduceMax", [add(f"{name}.absolute", "Abs", [data]), last_axis])
        size = add(f"{name}.size", "Max", [largest, least])
        unit = add(f"{name}.unit", "Div", [data, size])
        rounded = add(f"{name}.rounded", "QuantizeLinear", [unit, scale, zero])
        data = add(f"{name}.steps", "DequantizeLinear", [rounded, scale, zero])
        graph.constants[f"{name}.levels"] = _eight_bit_tensor(f"{name}.levels", layer.levels, kind)
        scales = graph.add_constant(f"{name}.weight_scales", layer.weight_scales)
        axis = {"axis": 1} if layer.weight_scales.ndim else {}
        weight = add(f"{name}.weight", "DequantizeLinear", [f"{name}.levels", scales], **axis)
        nodes.append(helper.make_node("MatMul", [data, weight], [f"{name}.product"], name=name))
        sized = add(f"{name}.sized", "Mul", [f"{name}.product", size])
        bias = graph.add_constant(f"{name}.bias", layer.bias)
        nodes.append(helper.make_node("Add", [sized, bias], list(node.output), name=f"{name}.add"))
    graph.nodes = nodes
    return graph.finish()


def _half(value: Any) -> Any:
    """Rounded to FP16, the type of the scales in the finished graph; never zero."""
    import numpy as np

    return np.maximum(value.astype(np.float16), np.float16(1e-7)).astype(np.float32)


def _weight_scales(weight: Any, kind: EightBit) -> Any:
    import numpy as np

    return _half(np.abs(weight).max(axis=0 if kind == "int8" else None).clip(1e-7) / _TOP[kind])


def _unit_scale(kind: EightBit) -> Any:
    """The quantisation step of a row whose largest number is one."""
    import numpy as np

    return _half(np.asarray(1 / _TOP[kind]))


def _round(rows: Any, kind: EightBit) -> Any:
    """(R, K) rows rounded to the eight-bit type, each relative to its largest number."""
    import numpy as np

    scale = _unit_scale(kind) * np.abs(rows).max(axis=1, keepdims=True).clip(_LEAST)
    return _to_grid(rows / scale, kind) * scale


def _to_grid(steps: Any, kind: EightBit) -> Any:
    """Multiples of a scale, rounded to the values of the eight-bit type; float32."""
    import ml_dtypes
    import numpy as np

    within = np.clip(steps, -_TOP[kind], _TOP[kind])
    return np.rint(within) if kind == "int8" else within.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _bits(levels: Any, kind: EightBit) -> Any:
    import ml_dtypes
    import numpy as np

    return levels.astype(np.int8) if kind == "int8" else levels.astype(ml_dtypes.float8_e4m3fn).view(np.int8)


def _eight_bit_tensor(name: str, levels: Any, kind: EightBit) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    if kind == "int8":
        return numpy_helper.from_array(levels, name)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, levels.shape, levels.tobytes(), raw=True)
