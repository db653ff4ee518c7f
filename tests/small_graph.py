"""A graph with the real inputs and outputs and one small matrix, so that TensorRT builds its plan quickly."""

from pathlib import Path

import numpy as np


def write_small_graph(path: Path) -> Path:
    """pixels (N, 224, 224, 3) uint8 -> embedding (N, 512) float32 with L2 norm 1: the mean colour times a matrix."""
    import onnx

    make, weights = onnx.helper.make_node, np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            make("Cast", ["pixels"], ["whole"], to=onnx.TensorProto.FLOAT),
            make("ReduceMean", ["whole", "axes"], ["colours"], keepdims=0),
            make("MatMul", ["colours", "weights"], ["image_features"]),
            make("ReduceL2", ["image_features", "last"], ["norm"], keepdims=1),
            make("Div", ["image_features", "norm"], ["embedding"]),
        ],
        "small",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 224, 224, 3])],
        [onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 512])],
        [
            onnx.numpy_helper.from_array(np.array([1, 2]), "axes"),
            onnx.numpy_helper.from_array(np.array([1]), "last"),
            onnx.numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def write_small_transformer(path: Path) -> Path:
    """pixels -> embedding by a transformer of one block, 32 wide, over the image's 7 x 7 squares of mean colour."""
    import onnx

    make, array, random = onnx.helper.make_node, onnx.numpy_helper.from_array, np.random.default_rng(0)
    width = 32
    weights = {
        "patches": (3, width),
        "qkv": (width, width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "projection": (width, 512),
    }
    constants = {
        name: random.normal(size=shape).astype(np.float32) / shape[0] ** 0.5 for name, shape in weights.items()
    }
    constants |= {
        "squares": np.array([0, 7, 32, 7, 32, 3]),
        "inside": np.array([2, 4]),
        "rows": np.array([0, 49, 3]),
        "most": np.array(255, np.float32),
        "tokens_axis": np.array([1]),
        "last": np.array([-1]),
    }
    nodes = [
        make("Cast", ["pixels"], ["whole"], to=onnx.TensorProto.FLOAT),
        make("Reshape", ["whole", "squares"], ["squared"]),
        make("ReduceMean", ["squared", "inside"], ["colours"], keepdims=0),
        make("Reshape", ["colours", "rows"], ["listed"]),
        make("Div", ["listed", "most"], ["share"]),
        make("MatMul", ["share", "patches"], ["tokens"], name="patches"),
        make("MatMul", ["tokens", "qkv"], ["q"], name="qkv"),
        make("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        make("MatMul", ["q", "k"], ["scores"], name="scores"),
        make("Softmax", ["scores"], ["weighed"], axis=-1),
        make("MatMul", ["weighed", "q"], ["mixed"], name="mix"),
        make("MatMul", ["mixed", "out"], ["attended"], name="out"),
        make("Add", ["tokens", "attended"], ["stream"]),
        make("MatMul", ["stream", "up"], ["hidden"], name="up"),
        make("Sigmoid", ["hidden"], ["gates"]),
        make("Mul", ["hidden", "gates"], ["active"]),
        make("MatMul", ["active", "down"], ["lowered"], name="down"),
        make("Add", ["stream", "lowered"], ["stream_2"]),
        make("ReduceMean", ["stream_2", "tokens_axis"], ["pooled"], keepdims=0),
        make("MatMul", ["pooled", "projection"], ["image_features"], name="projection"),
        make("ReduceL2", ["image_features", "last"], ["norm"], keepdims=1),
        make("Div", ["image_features", "norm"], ["embedding"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "small_transformer",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 224, 224, 3])],
        [onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 512])],
        [array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path
