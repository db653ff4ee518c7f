"""A graph with the real tensors and one small matrix: TensorRT builds a plan of it in a moment."""

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
