"""Model repositories that differ in what a measurement varies, and the graph that takes tensors."""

import numpy as np
import pytest
from onnx import TensorProto, checker, helper

from clip_tools.errors import ToolError
from clip_tools.measuring.variants import MEAN, STD, TENSOR_INPUT, Variant, change, take_tensors, write_repository
from clip_tools.paths import MODELS
from clip_tools.repository import read_config
from clip_tools.serving.machine import Machine


def small_graph():
    """The head of an image tower with a convolution: cast, scale, and a batch size read from the input."""
    nodes = [
        helper.make_node("Shape", ["pixels"], ["batch_size"], start=0, end=1),
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "scale"], ["normalised"]),
        helper.make_node("Conv", ["normalised", "kernel"], ["patches"], strides=[224, 224]),
        helper.make_node("Concat", ["batch_size", "width"], ["shape"], axis=0),
        helper.make_node("Reshape", ["patches", "shape"], ["embedding"]),
    ]
    kernel = np.full((4, 3, 224, 224), 1 / (3 * 224 * 224), np.float32)
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [255.0]),
        helper.make_tensor("kernel", TensorProto.FLOAT, kernel.shape, kernel.ravel()),
        helper.make_tensor("width", TensorProto.INT64, [1], [4]),
    ]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 4])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_cut_graph_takes_normalised_tensors_and_gives_the_same_vectors():
    import onnxruntime

    whole, cut = small_graph(), small_graph()
    take_tensors(cut)
    checker.check_model(cut, full_check=True)
    assert [entry.name for entry in cut.graph.input] == [TENSOR_INPUT]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    tensors = ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)

    def run(model, feeds):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["embedding"], feeds)[0]

    # The graph turns the tensors back into pixels, in FP32.
    assert np.allclose(run(whole, {"pixels": pixels}), run(cut, {TENSOR_INPUT: tensors}), atol=1e-6)


def test_a_graph_whose_weights_normalise_takes_normalised_tensors_too(tiny_model):
    """The exported graph turns the tensors back into pixels, so the arithmetic is the same."""
    import onnx
    import onnxruntime

    cut = onnx.load(str(tiny_model))
    assert not any(node.op_type == "Conv" for node in cut.graph.node)
    take_tensors(cut)
    checker.check_model(cut, full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    tensors = ((pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(
        0, 3, 1, 2
    )

    def run(model, feeds):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return session.run(["embedding"], feeds)[0]

    whole = run(str(tiny_model), {"pixels": pixels})
    assert (whole * run(cut.SerializeToString(), {TENSOR_INPUT: tensors})).sum(axis=1).min() > 0.999999


def test_a_graph_without_a_cast_of_its_pixels_cannot_be_cut():
    model = small_graph()
    del model.graph.node[1]
    with pytest.raises(ToolError, match="no Cast of its pixels"):
        take_tensors(model)


def test_a_variant_changes_what_it_names_and_nothing_else():
    variant = Variant(preprocess_instances=7, engine_threads=1, queue_delay_us=500, max_batch=16)
    configs = {name: read_config(MODELS, name) for name in ("preprocess", "clip_onnx", "clip_ensemble")}
    assert [change(config, variant) for config in configs.values()] == [True, True, False]
    assert [list(config.dynamic_batching.preferred_batch_size) for config in configs.values()] == [[1], [16], []]
    assert configs["preprocess"].instance_group[0].count == 7
    assert configs["clip_onnx"].instance_group[0].count == 1
    assert configs["clip_onnx"].parameters["intra_op_thread_count"].string_value == "1"
    assert configs["clip_onnx"].dynamic_batching.max_queue_delay_microseconds == 500
    assert {config.max_batch_size for config in configs.values()} == {64}  # what clients may send
    assert not change(read_config(MODELS, "preprocess"), Variant())


def test_the_start_keeps_the_preprocess_instances_of_a_variant():
    """Also if the start itself would choose another count."""
    here = Machine.here().preprocess_instances
    for count in (here, here + 1):
        config = read_config(MODELS, "preprocess")
        change(config, Variant(preprocess_instances=count))
        Machine.here().apply_to(config)
        assert config.instance_group[0].count == count


def test_a_variants_repository_serves_the_same_files(tmp_path):
    """Only the named configuration is changed. The committed files stay as they are."""
    repository = write_repository(Variant("cpu-bf16", preprocess_instances=1), tmp_path / "models")
    assert read_config(repository, "preprocess", "cpu-bf16").instance_group[0].count == 1
    assert read_config(repository, "clip_onnx", "cpu-bf16") == read_config(MODELS, "clip_onnx", "cpu-bf16")
    source = MODELS / "preprocess" / "1" / "clip_preprocess.py"
    assert (repository / "preprocess" / "1" / "clip_preprocess.py").read_bytes() == source.read_bytes()
