"""Cuts a graph into parts that run one after the other, so that each can have its own precision."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError
from clip_tools.export.precision import MATRIX_OPS

if TYPE_CHECKING:
    import onnx

_OF_A_BLOCK = ("attention", "mlp up", "mlp down")


@dataclass(frozen=True)
class Layer:
    """A product with weights, or a whole attention, with the nodes around it: nodes [first, end) in file order."""

    name: str
    first: int
    end: int


def layers(model: "onnx.ModelProto") -> list[Layer]:
    """The layers of a graph, one for each product with weights, cut where the fewest numbers cross the border.

    Attention is one layer, from its first product to its last: OpenVINO 2025.4 does not compile a BF16 part that ends
    before the last one (`BrgemmCPU node has incompatible input element types`). If queries have a product apart from
    keys and values, both are in that layer.
    """
    nodes = list(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [index for index, node in enumerate(nodes) if node.op_type in (*MATRIX_OPS, "Gemm")]
    weighted = [index for index in products if constants.intersection(nodes[index].input[:2])]
    if not weighted:
        raise ToolError("the graph has no product with weights, so there is nothing to tune")
    crossing = _crossing_numbers(model)
    cuts, ends = [], []
    for before, after in itertools.pairwise(weighted):
        if any(before < index < after for index in products):
            continue  # the products inside attention
        if not _follows(nodes, before, after):
            continue  # queries, and keys and values
        # Among equal places the last one: a LayerNorm goes with the product that reads it.
        cuts.append(min(range(before + 1, after + 1), key=lambda at: (crossing[at], -at)))
        ends.append(before)
    names = _names([nodes[index].name for index in [*ends, weighted[-1]]])
    return [Layer(name, first, end) for name, first, end in zip(names, [0, *cuts], [*cuts, len(nodes)], strict=True)]


def cut(model: "onnx.ModelProto", at: Sequence[int]) -> "list[onnx.ModelProto]":
    """The parts of a graph that is cut before these nodes, in ascending order. Parts keep the graph's tensor names."""
    import onnx
    from onnx import helper

    values = _values(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    graph_outputs = {value.name for value in model.graph.output}
    edges = [0, *at, len(nodes)]
    found = []
    for first, end in itertools.pairwise(edges):
        own = nodes[first:end]
        made = {name for node in own for name in node.output}
        used = {name: None for node in own for name in node.input if name}
        later = {name for node in nodes[end:] for name in node.input} | graph_outputs
        inputs = [name for name in used if name not in made and name not in constants]
        outputs = [name for node in own for name in node.output if name in later]
        graph = helper.make_graph(
            own,
            f"{model.graph.name}_{first}",
            [values[name] for name in inputs],
            [values[name] for name in outputs],
            [constants[name] for name in used if name in constants],
        )
        part = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        onnx.checker.check_model(part)
        found.append(part)
    return found


def _follows(nodes: Sequence[Any], before: int, after: int) -> bool:
    """Whether node `after` depends on node `before`."""
    made = set(nodes[before].output)
    for node in nodes[before + 1 : after + 1]:
        if made.intersection(node.input):
            made.update(node.output)
    return not made.isdisjoint(nodes[after].input)


def _values(model: "onnx.ModelProto") -> dict[str, Any]:
    """Type and shape of every input, output and computed tensor, by name."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value for value in [*graph.input, *graph.output, *graph.value_info]}


def _crossing_numbers(model: "onnx.ModelProto") -> list[int]:
    """For each node, how many numbers of one image are computed before it and used by it or later."""
    nodes = list(model.graph.node)
    sizes = {name: _size(value) for name, value in _values(model).items()}
    end = {name: index + 1 for index, node in enumerate(nodes) for name in node.input}
    end |= {value.name: len(nodes) for value in model.graph.output}
    crossing = [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        for name in node.output:
            for at in range(index + 1, end.get(name, 0)):
                crossing[at] += sizes.get(name, 0)
    return crossing


def _size(value: Any) -> int:
    """How many numbers a tensor has for one image; a dimension such as `12*batch` counts as 12."""
    size = 1
    for dim in value.type.tensor_type.shape.dim:
        factor = dim.dim_param.split("*")[0]
        size *= dim.dim_value or (int(factor) if factor.isdigit() else 1)
    return size


def _names(products: Sequence[str]) -> list[str]:
    """Readable names for the layers of a ViT; the nodes' names for any other graph."""
    blocks, rest = divmod(len(products) - 2, len(_OF_A_BLOCK))
    if rest or blocks < 1:
        return list(products)
    inside = [f"block {block}, {part}" for block in range(blocks) for part in _OF_A_BLOCK]
    return ["patches", *inside, "projection"]
