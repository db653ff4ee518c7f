"""Rotates the residual stream of a tower, so that it has no outlier channels when it is rounded to eight bits.

A few channels of a trained ViT are tens of times as large as the others, and one scale for a row of a layer's input
spends its levels on them. An orthogonal matrix spreads them over all channels (QuaRot, arXiv:2404.00456). It costs one
product after the first norm. The matrix maps ones to ones, so it keeps a row's mean, and every other norm turns the
rotated stream into the rotated result. The inverse and the norms' weights are folded into the weights after the norms.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_tools.export.precision import Graph

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Floats = npt.NDArray[np.float64]

ROTATION = "rotation"  # the name of the constant and of its product
_PICKERS = ("Slice", "Gather")  # of the class token's row
_MOVERS = ("Transpose", "Reshape", *_PICKERS)  # the ones in an exported tower


@dataclass(frozen=True)
class _Linear:
    """A product with a weight and the addition of its bias, which may be None."""

    product: Any
    bias: Any | None


@dataclass(frozen=True)
class _Stream:
    """The nodes that write to and read from the residual stream, which begins at tensor `start`."""

    start: str
    writers: tuple[_Linear, ...]
    readers: tuple[tuple[Any, tuple[_Linear, ...]], ...]  # (norm, the linear layers after it)


def rotate(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with a rotated residual stream, equal but for FP32 rounding; unchanged if it is no plain pre-norm ViT.

    Its linear layers must be MatMul and Add.
    """
    import numpy as np
    import onnx
    from onnx import helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    stream = _find_stream(graph)
    if stream is None:
        return model
    width = len(graph.array(stream.readers[0][0].input[1]))
    rotation = mean_keeping_rotation(width)
    ones = graph.add_constant("norm_ones", np.ones(width, np.float32))
    zeros = graph.add_constant("norm_zeros", np.zeros(width, np.float32))
    added: dict[str, Any] = {}  # by the name of the node that they follow
    for norm, layers in stream.readers:
        gain, offset = (graph.array(name).astype(np.float64) for name in norm.input[1:3])
        for layer in layers:
            weight = graph.array(layer.product.input[1]).astype(np.float64)
            _set(graph, layer.product, 1, rotation.T @ (gain[:, None] * weight))
            if layer.bias is not None:
                _set(graph, layer.bias, 1, graph.array(layer.bias.input[1]) + offset @ weight)
                continue
            name, exact = layer.product.name, layer.product.output[0]
            layer.product.output[0] = f"{exact}.unbiased"
            graph.add_constant(f"{name}.offset", np.asarray(offset @ weight, np.float32))
            added[name] = helper.make_node(
                "Add", [f"{exact}.unbiased", f"{name}.offset"], [exact], name=f"{name}.add_offset"
            )
        norm.input[1], norm.input[2] = ones, zeros
    for layer in stream.writers:
        _set(graph, layer.product, 1, graph.array(layer.product.input[1]).astype(np.float64) @ rotation)
        if layer.bias is not None:
            _set(graph, layer.bias, 1, graph.array(layer.bias.input[1]).astype(np.float64) @ rotation)
    start = next(node for node in graph.nodes if node.output[0] == stream.start)
    start.output[0] = f"{stream.start}.straight"
    graph.add_constant(ROTATION, rotation.astype(np.float32))
    added[start.name] = helper.make_node("MatMul", [start.output[0], ROTATION], [stream.start], name=ROTATION)
    nodes = []
    for node in graph.nodes:
        nodes += [node, added[node.name]] if node.name in added else [node]
    graph.nodes = nodes
    return graph.finish()


def mean_keeping_rotation(width: int) -> "Floats":
    """An orthogonal (width, width) matrix whose rows and columns each sum to 1, so that it keeps a row's mean."""
    import numpy as np

    random = np.random.default_rng(0)
    basis = random.normal(size=(width, width))
    basis[:, 0] = 1  # the direction that is kept
    kept, _ = np.linalg.qr(basis)
    inner, _ = np.linalg.qr(random.normal(size=(width - 1, width - 1)))
    rotation: Floats = np.outer(kept[:, 0], kept[:, 0]) + kept[:, 1:] @ inner @ kept[:, 1:].T
    return rotation


def _set(graph: Graph, node: Any, index: int, value: "npt.NDArray[Any]") -> None:
    """Give the node a new constant, because others may share its old one."""
    import numpy as np

    node.input[index] = graph.add_constant(f"{node.name}.turned", np.asarray(value, np.float32))


def _find_stream(graph: Graph) -> _Stream | None:
    """The residual stream from the first norm on; None if any node on it is not recognised."""
    makers = {node.output[0]: node for node in graph.nodes}
    users: dict[str, list[Any]] = {}
    for node in graph.nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    first = next((node for node in graph.nodes if node.op_type == "LayerNormalization"), None)
    if first is None:
        return None
    writers: list[_Linear] = []
    readers: list[tuple[Any, tuple[_Linear, ...]]] = []
    seen: set[str] = set()
    waiting = [first.output[0]]
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        for node in users.get(tensor, []):
            if node.op_type == "LayerNormalization" and node.input[0] == tensor:
                layers = _layers_after(graph, users, node)
                if layers is None:
                    return None
                readers.append((node, layers))
            elif node.op_type == "Add":
                branch = next(name for name in node.input if name != tensor) if len(set(node.input)) == 2 else ""
                writer = _layer_before(graph, makers, users, branch)
                if writer is None:
                    return None
                writers.append(writer)
                waiting.append(node.output[0])
            elif node.input[0] == tensor and _picks_tokens(graph, node):
                waiting.append(node.output[0])
            else:
                return None
    return _Stream(first.output[0], tuple(writers), tuple(readers)) if readers else None


def _layers_after(graph: Graph, users: dict[str, list[Any]], norm: Any) -> tuple[_Linear, ...] | None:
    """The linear layers that read this norm; None if anything else reads it."""
    layers: list[_Linear] = []
    waiting = [norm.output[0]]
    while waiting:
        tensor = waiting.pop()
        for node in users.get(tensor, []):
            if node.op_type in _MOVERS and node.input[0] == tensor:
                waiting.append(node.output[0])
            elif node.op_type == "MatMul" and node.input[0] == tensor and _is_matrix(graph, node.input[1]):
                behind = users.get(node.output[0], [])
                biased = len(behind) == 1 and behind[0].op_type == "Add" and _is_vector(graph, behind[0].input[1])
                layers.append(_Linear(node, behind[0] if biased else None))
            else:
                return None
    return tuple(layers)


def _layer_before(graph: Graph, makers: dict[str, Any], users: dict[str, list[Any]], tensor: str) -> _Linear | None:
    """The linear layer that computes this tensor, for one reader alone; None if anything else computes it."""
    bias = None
    while node := makers.get(tensor):
        if len(users[tensor]) != 1:
            return None
        if node.op_type == "MatMul" and _is_matrix(graph, node.input[1]):
            return _Linear(node, bias)
        if node.op_type == "Add" and bias is None and _is_vector(graph, node.input[1]):
            bias = node
        elif node.op_type not in _MOVERS:
            return None
        tensor = node.input[0]
    return None


def _picks_tokens(graph: Graph, node: Any) -> bool:
    """Whether it selects from axis 1, the tokens, so that its output has every channel of the stream."""
    if node.op_type == "Slice":
        return len(node.input) > 3 and node.input[3] in graph.constants and graph.array(node.input[3]).tolist() == [1]
    return node.op_type == "Gather" and any(a.name == "axis" and a.i == 1 for a in node.attribute)


def _is_matrix(graph: Graph, name: str) -> bool:
    return name in graph.constants and len(graph.constants[name].dims) == 2


def _is_vector(graph: Graph, name: str) -> bool:
    return name in graph.constants and len(graph.constants[name].dims) == 1
