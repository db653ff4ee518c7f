"""Rewrites the exported FP32 graph in a lower precision, or emulates that precision in FP32 on a CPU.

The graph is strongly typed: it states the type of every tensor, so TensorRT chooses none. Matrix multiplications,
attention and convolutions run in the low type. LayerNorm, the activation, the residual stream and the final norm stay
in FP32, with a cast at each border: in FP16 throughout, this ViT loses its accuracy (NVIDIA/TensorRT#2709). Inputs and
outputs do not change.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clip_tools.accuracy.gates import Precision
from clip_tools.errors import ToolError, needs_extra

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

Half = Literal["fp16", "bf16"]

_BF16_OPSET = 22
_LARGE_BYTES = 1024  # type inference skips larger constants; smaller ones may be shapes, whose values it needs
MATRIX_OPS = ("MatMul", "Conv", "Attention")
# These only move numbers, so their output has the type of their first input, the data.
_MOVERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Slice", "Split", "Pad")
_ARITHMETIC = (
    *MATRIX_OPS,
    "Add",
    "Mul",
    "Sub",
    "Div",
    "Sigmoid",
    "Erf",
    "LayerNormalization",
    "Softmax",
    "ReduceL2",
    "Clip",
)


@dataclass
class Graph:
    """An ONNX graph being rewritten: its nodes in order, and its constants by name."""

    model: "onnx.ModelProto"

    def __post_init__(self) -> None:
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = list(self.model.graph.node)

    def array(self, name: str) -> "npt.NDArray[np.float32]":
        """The value of this constant."""
        from onnx import numpy_helper

        value: npt.NDArray[np.float32] = numpy_helper.to_array(self.constants[name])
        return value

    def add_constant(self, name: str, value: "npt.NDArray[Any]") -> str:
        """Add a constant, or replace the one of this name."""
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def finish(self) -> "onnx.ModelProto":
        """The model with these nodes and the constants that they use."""
        import onnx

        used = {name for node in self.nodes for name in node.input}
        graph = self.model.graph
        model = onnx.ModelProto()
        model.CopyFrom(onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import))
        model.graph.name = graph.name
        model.graph.input.extend(graph.input)
        model.graph.output.extend(graph.output)
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in used)
        return model


def split_gemm(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph with every Gemm as MatMul and Add, so that all linear layers have one form.

    The exporter puts a Reshape before and after each Gemm, which takes two dimensions; those stay.
    """
    from onnx import helper

    if not any(node.op_type == "Gemm" for node in model.graph.node):
        return model
    graph = Graph(model)
    nodes = []
    for node in graph.nodes:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("transA") or (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
            raise ToolError(f"{node.name}: a Gemm with {attributes} was not expected: this exporter is newer")
        data, weight = node.input[:2]
        if attributes.get("transB"):
            weight = graph.add_constant(f"{weight}.T", graph.array(weight).T.copy())
        if len(node.input) == 2:  # the exporter leaves out a bias of zeros
            nodes.append(helper.make_node("MatMul", [data, weight], list(node.output), name=node.name))
            continue
        product = f"{node.output[0]}_product"
        nodes.append(helper.make_node("MatMul", [data, weight], [product], name=f"{node.name}_matmul"))
        nodes.append(helper.make_node("Add", [product, node.input[2]], list(node.output), name=node.name))
    graph.nodes = nodes
    return graph.finish()


def fold_normalisation(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with `(x / 255 - mean) / std` moved into the first convolution, which now reads `(x - 128) / 128`.

    FP16 and BF16 represent these inputs exactly, so a lower precision rounds no pixel. With the reshaped B-32 this
    raised the worst FP16 cosine from 0.9957 to 0.9997, with the bias in FP32 as here. The offset becomes an FP32 bias
    after the convolution. A graph that does not begin like the exported ViT is returned unchanged.
    """
    import numpy as np
    from onnx import helper

    graph = Graph(model)
    maker = {node.output[0]: node for node in graph.nodes}
    conv = next((node for node in graph.nodes if node.op_type == "Conv"), None)
    steps: list[Any] = []
    name = conv.input[0] if conv else ""
    while name in maker and maker[name].op_type != "Cast" and len(steps) < 4:
        steps.append(maker[name])
        name = maker[name].input[0]
    pads = [value for a in (conv.attribute if conv else ()) if a.name == "pads" for value in a.ints]
    if conv is None or [s.op_type for s in steps] != ["Div", "Sub", "Div", "Transpose"] or any(pads):
        return model  # padding would be black before the normalisation and gray after it
    std, mean, scale = (np.float64(graph.array(step.input[1])) for step in steps[:3])
    weight = np.float64(graph.array(conv.input[1]))
    bias = (weight * ((128 / scale - mean) / std)).sum(axis=(1, 2, 3))
    if len(conv.input) > 2:
        bias += graph.array(conv.input[2])
    graph.add_constant("folded_weight", np.asarray(weight * (128 / scale) / std, np.float32))
    graph.add_constant("folded_bias", np.asarray(bias, np.float32).reshape(-1, 1, 1))
    graph.add_constant("pixel_centre", np.asarray(128, np.float32))
    graph.add_constant("pixel_scale", np.asarray(1 / 128, np.float32))
    folded = _copy(conv)
    del folded.input[:]
    folded.input.extend(["pixels_scaled", "folded_weight"])
    folded.output[0] = "folded_patches"
    replaced = {
        steps[0].name: None,
        steps[1].name: helper.make_node("Mul", ["pixels_centred", "pixel_scale"], ["pixels_scaled"], name="scale"),
        steps[2].name: helper.make_node("Sub", [steps[2].input[0], "pixel_centre"], ["pixels_centred"], name="centre"),
        conv.name: folded,
    }
    nodes = []
    for node in graph.nodes:
        made = replaced.get(node.name, node)
        nodes += [made] if made is not None else []
        if node.name == conv.name:
            nodes.append(
                helper.make_node("Add", ["folded_patches", "folded_bias"], [conv.output[0]], name="patch_bias")
            )
    graph.nodes = nodes
    return graph.finish()


def lower(model: "onnx.ModelProto", half: Half, *, keep: Iterable[str] = ()) -> "onnx.ModelProto":
    """The graph with its matrix arithmetic in `half`, strongly typed. `keep` names matrix nodes that stay in FP32."""
    with needs_extra("export"):
        from onnx import TensorProto, helper

    low = TensorProto.FLOAT16 if half == "fp16" else TensorProto.BFLOAT16
    graph = Graph(split_gemm(fold_normalisation(model)))
    full = TensorProto.FLOAT
    types = _float_tensors(graph)  # name -> FLOAT, for every computed float tensor
    kept = set(keep)
    biases = _low_biases(graph) if half == "fp16" else set()
    casts: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []

    def in_type(name: str, target: int) -> str:
        if name in graph.constants:
            if target == full or graph.constants[name].data_type != full:
                return name
            return _rounded_constant(graph, name, half)
        if name not in types or types[name] == target:
            return name
        if (name, target) not in casts:
            casts[name, target] = f"{name}_{'fp32' if target == full else half}"
            nodes.append(
                helper.make_node("Cast", [name], [casts[name, target]], name=f"cast_{casts[name, target]}", to=target)
            )
        return casts[name, target]

    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.name not in kept:
            # The product has the type of the scale: an FP32 scale would multiply eight-bit factors in FP32.
            changed = _copy(node)
            changed.input[1] = _rounded_constant(graph, node.input[1], half)
            types[node.output[0]] = low
            nodes.append(changed)
            continue
        computed = [name for name in node.input if name in types]
        if not computed or node.op_type == "Shape":
            nodes.append(node)  # shapes, and constants of a computed size
            continue
        target: int = full
        if (node.op_type in MATRIX_OPS or node.name in biases) and node.name not in kept:
            target = low
        elif node.op_type in _MOVERS:
            target = types[computed[0]]
        changed = _copy(node)
        data = list(node.input[:1]) if node.op_type in _MOVERS else list(node.input)
        for index, name in enumerate(data):
            changed.input[index] = in_type(name, target)
        types |= {name: target for name in node.output if name in types}  # not the integers of a QuantizeLinear
        nodes.append(changed)
    graph.nodes = nodes
    lowered = graph.finish()
    if half == "bf16":  # the first opset whose Conv takes it; the other operators here did not change
        lowered.opset_import[0].version = max(lowered.opset_import[0].version, _BF16_OPSET)
    return lowered


def _low_biases(graph: Graph) -> set[str]:
    """The bias additions that FP16 may do: those of query, key and value, and those before the activation.

    1 - mean cosine of the reshaped B-32 on the gate's 121 photographs was 7e-6 with every bias in FP32, 8e-6 with these
    in FP16, 12e-6 with those that go to the residual stream, 15e-6 with these and the activation.
    """
    makers = {name: node for node in graph.nodes for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def is_added(name: str) -> bool:
        return any(
            user.op_type == "Add" or (user.op_type in _MOVERS and any(map(is_added, user.output)))
            for user in users.get(name, [])
        )

    return {
        node.name
        for node in graph.nodes
        if node.op_type == "Add"
        and node.input[1] in graph.constants
        and getattr(makers.get(node.input[0]), "op_type", "") == "MatMul"
        and not is_added(node.output[0])
    }


def naive_half(model: "onnx.ModelProto", half: Half = "fp16") -> "onnx.ModelProto":
    """The graph with everything after the pixels in `half`, LayerNorm and norms too: this loses accuracy.

    docs/precision.md shows that it fails the gate.
    """
    from onnx import TensorProto, helper

    low = TensorProto.FLOAT16 if half == "fp16" else TensorProto.BFLOAT16
    graph = Graph(split_gemm(model))
    for name, tensor in list(graph.constants.items()):
        if tensor.data_type == TensorProto.FLOAT:
            graph.constants[name] = _round_tensor(graph.array(name), name, half)
    nodes = []
    for node in graph.nodes:
        changed = _copy(node)
        if node.op_type == "Cast":
            changed = helper.make_node("Cast", list(node.input), list(node.output), name=node.name, to=low)
        if node.op_type == "LayerNormalization":
            del changed.attribute[:]
            changed.attribute.extend(a for a in node.attribute if a.name != "stash_type")
            changed.attribute.append(helper.make_attribute("stash_type", low if half == "bf16" else 1))
        if node.output[0] == "embedding":
            changed.output[0] = "embedding_low"
        nodes.append(changed)
    nodes.append(helper.make_node("Cast", ["embedding_low"], ["embedding"], name="cast_out", to=TensorProto.FLOAT))
    graph.nodes = nodes
    return graph.finish()


def is_low(model: "onnx.ModelProto") -> bool:
    """Whether the graph has an FP16 or BF16 constant, or a cast to one of them."""
    from onnx import TensorProto

    lows = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return any(tensor.data_type in lows for tensor in model.graph.initializer) or any(
        attribute.i in lows
        for node in model.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    )


def emulate_in_fp32(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph in FP32 arithmetic, with values rounded to FP16 or BF16 where the graph has these types.

    It shows on a CPU what a GPU computes. ONNX Runtime's CPU provider has no BF16 matrix multiplication, and computes
    FP16 ones in FP32 without rounding in between. A low-precision product that accumulates in FP32 is exactly this:
    rounded factors, an FP32 sum, a rounded result. Attention becomes two products and an FP32 softmax with rounded
    weights, as in flash kernels. A graph without low types is returned unchanged.
    """
    from onnx import TensorProto, helper, numpy_helper

    lows = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    types = {value.name: value.type.tensor_type.elem_type for value in _infer(model).graph.value_info}
    graph = Graph(model)
    if not any(kind in lows for kind in types.values()):
        return model
    for name, tensor in list(graph.constants.items()):
        if tensor.data_type in lows:
            types[name] = tensor.data_type
            graph.add_constant(name, numpy_helper.to_array(tensor).astype("float32"))
    nodes: list[Any] = []
    for node in graph.nodes:
        output = node.output[0]
        low = types.get(output)
        changed = _copy(node)
        if node.op_type == "Attention" and low in lows:
            nodes += _attention_by_products(graph, node, low)
            continue
        if low not in lows:
            nodes.append(changed)
            continue
        if node.op_type in _ARITHMETIC:
            changed.output[0] = f"{output}_exact"
            nodes.append(changed)
            source = changed.output[0]
        elif node.op_type == "Cast":
            source = node.input[0]
        else:  # moves numbers, or dequantises
            nodes.append(changed)
            continue
        nodes.append(helper.make_node("Cast", [source], [f"{output}_rounded"], name=f"{output}_round", to=low))
        nodes.append(
            helper.make_node("Cast", [f"{output}_rounded"], [output], name=f"{output}_widen", to=TensorProto.FLOAT)
        )
    graph.nodes = nodes
    return graph.finish()


def _attention_by_products(graph: Graph, node: Any, low: int) -> list[Any]:
    """The FP32 nodes for an Attention node of three (batch, tokens, width) inputs, with rounding to the low type.

    `scale` must be 1, as in our graphs: the query's weights include it.
    """
    import numpy as np
    from onnx import TensorProto, helper

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("scale") != 1.0 or attributes["q_num_heads"] != attributes["kv_num_heads"]:
        raise ToolError(f"{node.name}: an Attention with {attributes} was not expected")
    heads = graph.add_constant(f"{node.name}_heads", np.array([0, 0, attributes["q_num_heads"], -1]))
    flat = graph.add_constant(f"{node.name}_flat", np.array([0, 0, -1]))
    nodes: list[Any] = []

    def add(operator: str, inputs: list[str], made: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [made], name=made, **attributes))
        return made

    def rounded(name: str, made: str) -> str:
        return add("Cast", [add("Cast", [name], f"{made}_low", to=low)], made, to=TensorProto.FLOAT)

    parts = []
    for part, name, order in zip("qkv", node.input, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True):
        split = add("Reshape", [name, heads], f"{node.name}_{part}_split")
        parts.append(add("Transpose", [split], f"{node.name}_{part}", perm=order))
    scores = add("MatMul", parts[:2], f"{node.name}_scores")
    shares = rounded(add("Softmax", [scores], f"{node.name}_shares_exact", axis=-1), f"{node.name}_shares")
    mixed = add("MatMul", [shares, parts[2]], f"{node.name}_mixed_by_head")
    turned = add("Transpose", [mixed], f"{node.name}_mixed", perm=(0, 2, 1, 3))
    rounded(add("Reshape", [turned, flat], f"{node.name}_mixed_exact"), node.output[0])
    return nodes


def _infer(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with inferred types, without its large weights: with them a copy could exceed protobuf's 2 GB."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(model.graph, field))
    bare.graph.name = model.graph.name
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < _LARGE_BYTES:
            bare.graph.initializer.append(tensor)
        else:
            elsewhere = onnx.TensorProto.EXTERNAL
            bare.graph.initializer.add(
                name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=elsewhere
            ).external_data.add(key="location", value="left out")
    return onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=False)


def _float_tensors(graph: Graph) -> dict[str, int]:
    """The type FLOAT for every computed float tensor, by name."""
    from onnx import TensorProto

    inferred = _infer(graph.model).graph
    return {
        value.name: TensorProto.FLOAT
        for value in [*inferred.value_info, *inferred.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }


def _rounded_constant(graph: Graph, name: str, half: Half) -> str:
    rounded = f"{name}.{half}"
    if rounded not in graph.constants:
        graph.constants[rounded] = _round_tensor(graph.array(name), rounded, half)
    return rounded


def _round_tensor(value: "npt.NDArray[Any]", name: str, half: Half) -> Any:
    """The constant as a tensor of the low type. Raises ToolError if it overflows FP16."""
    import ml_dtypes
    import numpy as np
    from onnx import numpy_helper

    with np.errstate(over="ignore"):
        rounded = value.astype(np.float16 if half == "fp16" else ml_dtypes.bfloat16)
    if not np.isfinite(rounded.astype(np.float32)).all():
        plain = name.removesuffix(f".{half}")
        raise ToolError(f"{plain}: a weight of {np.abs(value).max():.3g} does not fit {half}; use bf16")
    return numpy_helper.from_array(rounded, name)


def _copy(node: Any) -> Any:
    import onnx

    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    return changed


def count_matrices(model: "onnx.ModelProto") -> dict[str, int]:
    """The number of matrix multiplications and convolutions of the graph in each precision, the most common first.

    A product counts as INT8 or FP8 if both factors were dequantised from it, as TensorRT fuses them, or if it is ONNX
    Runtime's dynamic MatMulInteger. An Attention node counts as two products.
    """
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.INT8: "int8",
        TensorProto.UINT8: "int8",
        TensorProto.FLOAT8E4M3FN: "fp8",
    }
    graph = _infer(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input, *graph.output]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    quantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"):
            counts["int8"] += 1
        elif node.op_type in (*MATRIX_OPS, "Gemm"):
            factors = [quantised.get(name, node.input[0]) for name in node.input[:2]]
            both = all(name in quantised for name in node.input[:2])
            kind = types.get(factors[0] if both else node.input[0], 0)
            counts[names.get(kind, f"type {kind}")] += 2 if node.op_type == "Attention" else 1
    return dict(counts.most_common())


def count_weights(model: "onnx.ModelProto") -> int:
    """The number of weights in the matrix multiplications and convolutions of a graph without Q/DQ."""
    import math

    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return sum(sizes.get(node.input[1], 0) for node in model.graph.node if node.op_type in (*MATRIX_OPS, "Gemm"))


def precision_of(model: "onnx.ModelProto") -> Precision:
    """The precision of the graph's matrix multiplications: INT8 or FP8 if any has it, else the lowest."""
    found = count_matrices(model)
    order: tuple[Precision, ...] = ("fp8", "int8", "bf16", "fp16")
    return next((name for name in order if name in found), "fp32")
