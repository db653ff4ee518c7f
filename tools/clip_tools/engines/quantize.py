"""An FP32 graph with explicit Q/DQ pairs around its linear layers, in INT8 or FP8.

Static and symmetric, one scale for a layer's activations and, in INT8, one for each output channel of its weights:
what TensorRT's eight-bit kernels take. Plain INT8 ranges lose this model (cosine 0.63 was seen), so

- the residual stream is turned until no channel stands out (rotation.py),
- each input channel is shifted to the middle of its range (Outlier Suppression+, arXiv:2304.09145),
- what makes its range wide is moved into the weights (SmoothQuant, arXiv:2211.10438), and the range may be clipped,
  as the error of the layer's product on calibration rows has it,
- the weights are fitted to the rounded inputs and then rounded so that later ones mend earlier ones (gptq.py), and
- the mean error that remains goes into the bias (arXiv:1906.04721).

The patch embedding, attention's own products, the rotation and the last projection stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.engines.gptq import curvature, fit_weights, round_weights
from clip_tools.engines.precision import Graph, fold_normalisation, split_gemm
from clip_tools.engines.rotation import ROTATION, rotate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Floats = npt.NDArray[np.float32]

Eight = Literal["int8", "fp8"]

_INT8_MAX, _FP8_MAX = 127.0, 448.0
# Tried for each layer; the best product wins. One alone: 0.5 gave B-16 a mean cosine of 0.9878, 0.7 0.9887.
_SMOOTHINGS = (0.4, 0.55, 0.7, 0.85)
_REACHES = (1.0, 0.85, 0.7)  # of the widest input: what lies beyond is clipped
_ROWS_TO_CHOOSE = 1536  # of the rows: enough to tell two ranges apart, not to fit weights


@dataclass(frozen=True)
class LayerStatistics:
    """What came into a linear layer: (K,) least and largest of each channel, and (R, K) rows as a sample."""

    least: "Floats"
    largest: "Floats"
    rows: "Floats"


@dataclass(frozen=True)
class QuantisedLayer:
    """A linear layer in eight bits: `(x - shift) / smooth` is rounded to multiples of `scale`.

    `shift` and `smooth` are (K,), `weight_scales` (N,) or (), `bias`, which is added to the product, (N,), all float32;
    scales are exact in FP16. `levels` are the (K, N) weights in multiples of their scale: int8, or float8_e4m3fn's bits
    as int8.
    """

    shift: "Floats"
    smooth: "Floats"
    scale: float
    weight_scales: "Floats"
    levels: "npt.NDArray[np.int8]"
    bias: "Floats"


def prepare(model: "onnx.ModelProto", kind: Eight) -> "onnx.ModelProto":
    """The graph in the form that is calibrated and quantised: one form of linear layer, pixels folded.

    For INT8 its stream is turned; FP8 has exponents of its own and does not mind a wide channel.
    """
    prepared = split_gemm(fold_normalisation(model))
    return rotate(prepared) if kind == "int8" else prepared


def linear_layers(model: "onnx.ModelProto") -> list[Any]:
    """The nodes that multiply by a weight inside the transformer, in order: all but the last, the projection."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    nodes = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights - {ROTATION}]
    return nodes[:-1]


def fit(statistics: LayerStatistics, weight: "Floats", kind: Eight) -> QuantisedLayer:
    """One layer in eight bits; `weight` is (K, N). By the squared error of the product, each row against its own size.

    Without that a few large rows, tokens that a ViT keeps for itself, would hide the error of all others.
    """
    import numpy as np

    wide, rows = weight.astype(np.float32), statistics.rows
    size = np.linalg.norm(rows @ wide, axis=1)
    shares = (1 / np.maximum(size, 0.1 * np.median(size)))[:, None].astype(np.float32)
    some = np.random.default_rng(0).permutation(len(rows))[:_ROWS_TO_CHOOSE]
    shift, smooth, scale = _choose_range(statistics, rows[some], shares[some], wide, kind)
    even = (rows - shift) / smooth
    seen = _round(even, np.float32(scale), kind)
    curved = curvature(seen * shares)
    moved = fit_weights(wide * smooth[:, None], even * shares, seen * shares, curved)
    weight_scales = _weight_scales(moved, kind)
    levels = round_weights(moved / weight_scales, curved, lambda steps: _to_grid(steps, kind))
    errors = (rows - shift) @ wide - seen @ (levels * weight_scales)
    bias = shift @ wide + np.average(errors, axis=0, weights=shares[:, 0] ** 2).astype(np.float32)
    return QuantisedLayer(shift, smooth, scale, weight_scales, _bits(levels, kind), bias)


def _choose_range(
    statistics: LayerStatistics, rows: "Floats", shares: "Floats", weight: "Floats", kind: Eight
) -> "tuple[Floats, Floats, float]":
    """(shift, smooth, scale) with the least error of the product, its weights rounded plainly."""
    import numpy as np

    exact = rows @ weight
    top = _INT8_MAX if kind == "int8" else _FP8_MAX
    best: tuple[float, Floats, Floats, float] | None = None
    for shift, smooth in _candidates(statistics, weight, kind):
        widest = float((np.maximum(statistics.largest - shift, shift - statistics.least) / smooth).max())
        moved = weight * smooth[:, None]
        weight_scales = _weight_scales(moved, kind)
        rounded = _to_grid(moved / weight_scales, kind) * weight_scales
        wanted = exact - shift @ weight
        for reach in _REACHES if kind == "int8" else (1.0,):
            scale = float(_half(np.asarray(max(widest * reach, 1e-6) / top)))
            error = wanted - _round((rows - shift) / smooth, np.float32(scale), kind) @ rounded
            loss = float((((error - error.mean(axis=0)) * shares) ** 2).mean())
            if best is None or loss < best[0]:
                best = loss, shift, smooth, scale
    assert best is not None  # noqa: S101
    return best[1:]


def quantize(model: "onnx.ModelProto", layers: Mapping[str, QuantisedLayer], kind: Eight) -> "onnx.ModelProto":
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
        graph.constants[f"{name}.weight"] = _eight_bit_tensor(f"{name}.weight", layer.levels, kind)
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
    """(shift, smooth) pairs to try, none first; FP8 needs neither."""
    import numpy as np

    found = [(np.zeros(len(weight), np.float32), np.ones(len(weight), np.float32))]
    if kind == "fp8":
        return found
    middle = (statistics.least + statistics.largest) / 2
    reach = np.maximum(statistics.largest - middle, middle - statistics.least).clip(1e-5)
    column = np.abs(weight).max(axis=1).clip(1e-5)
    for strength in _SMOOTHINGS:
        smooth = reach**strength / column ** (1 - strength)
        found.append((middle, np.asarray(smooth / np.exp(np.log(smooth).mean()), np.float32)))
    return found


def _half(value: Any) -> Any:
    """Rounded to FP16, which the scales are in the finished graph; never zero."""
    import numpy as np

    return np.maximum(value.astype(np.float16), np.float16(1e-7)).astype(np.float32)


def _weight_scales(weight: Any, kind: Eight) -> Any:
    import numpy as np

    top = _INT8_MAX if kind == "int8" else _FP8_MAX
    return _half(np.abs(weight).max(axis=0 if kind == "int8" else None).clip(1e-7) / top)


def _round(values: Any, scale: Any, kind: Eight) -> Any:
    """The values as the eight-bit type holds them."""
    import numpy as np

    if kind == "int8":  # of an activation -128 is one level more
        return np.clip(np.rint(values / scale), -_INT8_MAX - 1, _INT8_MAX) * scale
    return _to_grid(values / scale, kind) * scale


def _to_grid(steps: Any, kind: Eight) -> Any:
    """Multiples of a scale, rounded to what the eight-bit type has; float32."""
    import ml_dtypes
    import numpy as np

    if kind == "int8":
        return np.clip(np.rint(steps), -_INT8_MAX, _INT8_MAX)
    return np.clip(steps, -_FP8_MAX, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _bits(levels: Any, kind: Eight) -> Any:
    import ml_dtypes
    import numpy as np

    return levels.astype(np.int8) if kind == "int8" else levels.astype(ml_dtypes.float8_e4m3fn).view(np.int8)


def _eight_bit_tensor(name: str, levels: Any, kind: Eight) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    if kind == "int8":
        return numpy_helper.from_array(levels, name)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, levels.shape, levels.tobytes(), raw=True)
