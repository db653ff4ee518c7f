"""Lower precisions: the graph passes, their emulation in FP32, calibration and quantisation, and the gates."""

from pathlib import Path

import numpy as np
import pytest

from clip_tools.accuracy.gates import (
    GATES,
    Agreement,
    Gate,
    agreement,
    counts_for_nothing,
    failures,
    gate_of,
    gates_table,
    likely_neighbours_kept,
)
from clip_tools.errors import ToolError
from clip_tools.export.onnx_runner import EMULATED, NATIVE, run_onnx
from clip_tools.export.precision import (
    count_matrices,
    emulate_in_fp32,
    fold_normalisation,
    lower,
    naive_half,
    precision_of,
    split_gemm,
)
from clip_tools.paths import ROOT
from clip_tools.precision_results import results_table
from clip_tools.quantization.calibration import Calibration, calibrate, check_count, layer_statistics, split
from clip_tools.quantization.gptq import curvature, fit_weights, round_weights
from clip_tools.quantization.lower_precision import holds_with_margin
from clip_tools.quantization.quantize import QuantisedLayer, fit, linear_layers, prepare, quantize
from clip_tools.quantization.rotation import mean_keeping_rotation, rotate
from clip_tools.quantization.stepwise import Stepwise

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")


@pytest.fixture(scope="module")
def block() -> "onnx.ModelProto":
    """A small transformer block from pixels to embedding, with every kind of node of the real graph."""
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    random = np.random.default_rng(0)
    make = helper.make_node
    nodes = [
        make("Cast", ["pixels"], ["whole"], name="to_float", to=onnx.TensorProto.FLOAT),
        make("Transpose", ["whole"], ["planes"], name="permute", perm=[0, 3, 1, 2]),
        make("Div", ["planes", "most"], ["share"], name="share"),
        make("Sub", ["share", "mean"], ["centred"], name="minus_mean"),
        make("Div", ["centred", "std"], ["normal"], name="over_std"),
        make("Conv", ["normal", "kernel"], ["patches"], name="conv", strides=[56, 56]),
        make("Reshape", ["patches", "to_tokens"], ["columns"], name="flatten"),
        make("Transpose", ["columns"], ["tokens"], name="tokens_last", perm=[0, 2, 1]),
        make("LayerNormalization", ["tokens", "gamma", "beta"], ["even"], name="norm_1", axis=-1),
        make("MatMul", ["even", "weight_qk"], ["qk"], name="qk"),
        make("Transpose", ["qk"], ["qk_t"], name="turn", perm=[0, 2, 1]),
        make("MatMul", ["qk", "qk_t"], ["scores"], name="scores"),
        make("Softmax", ["scores"], ["shares"], name="softmax", axis=-1),
        make("MatMul", ["shares", "qk"], ["mixed"], name="mix"),
        make("Reshape", ["mixed", "to_rows"], ["rows"], name="rows"),
        make("Gemm", ["rows", "weight_out", "bias_out"], ["rows_out"], name="out", transB=1),
        make("Reshape", ["rows_out", "from_rows"], ["back"], name="unrows"),
        make("Add", ["tokens", "back"], ["stream"], name="residual"),
        make("ReduceMean", ["stream", "middle"], ["pooled"], name="pool", keepdims=0),
        make("MatMul", ["pooled", "projection"], ["features"], name="projection"),
        make("ReduceL2", ["features", "last"], ["length"], name="length", keepdims=1),
        make("Div", ["features", "length"], ["embedding"], name="unit"),
    ]
    width = 32

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32) / 8

    constants = {
        "most": np.array(255, np.float32),
        "mean": np.array([0.48, 0.45, 0.40], np.float32).reshape(1, 3, 1, 1),
        "std": np.array([0.26, 0.26, 0.27], np.float32).reshape(1, 3, 1, 1),
        "kernel": normal(width, 3, 56, 56) / 8,
        "to_tokens": np.array([0, 0, -1], np.int64),
        "gamma": 1 + normal(width) * 4,
        "beta": normal(width) * 4,
        "weight_qk": normal(width, width),
        "to_rows": np.array([-1, width], np.int64),
        "weight_out": normal(width, width),
        "bias_out": normal(width),
        "from_rows": np.array([-1, 16, width], np.int64),
        "middle": np.array([1], np.int64),
        "projection": normal(width, 512),
        "last": np.array([-1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 512])],
        [array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def tower() -> "onnx.ModelProto":
    """A small pre-norm tower: norm, residual stream with one branch, norm and projection. Channel 5 is an outlier."""
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    random = np.random.default_rng(2)
    make, width = helper.make_node, 32
    nodes = [
        make("Cast", ["pixels"], ["whole"], name="to_float", to=onnx.TensorProto.FLOAT),
        make("Transpose", ["whole"], ["planes"], name="permute", perm=[0, 3, 1, 2]),
        make("Conv", ["planes", "kernel"], ["patches"], name="conv", strides=[56, 56]),
        make("Reshape", ["patches", "to_tokens"], ["columns"], name="flatten"),
        make("Transpose", ["columns"], ["tokens"], name="tokens_last", perm=[0, 2, 1]),
        make("LayerNormalization", ["tokens", "gain_0", "offset_0"], ["start"], name="norm_0"),
        make("LayerNormalization", ["start", "gain_1", "offset_1"], ["even"], name="norm_1"),
        make("Transpose", ["even"], ["even_t"], name="turn", perm=[1, 0, 2]),
        make("MatMul", ["even_t", "weight_in"], ["wide"], name="in"),
        make("Add", ["wide", "bias_in"], ["wide_biased"], name="in_bias"),
        make("Sigmoid", ["wide_biased"], ["active"], name="active"),
        make("MatMul", ["active", "weight_out"], ["narrow"], name="out"),
        make("Add", ["narrow", "bias_out"], ["narrow_biased"], name="out_bias"),
        make("Transpose", ["narrow_biased"], ["branch"], name="turn_back", perm=[1, 0, 2]),
        make("Add", ["start", "branch"], ["stream"], name="residual"),
        make("LayerNormalization", ["stream", "gain_2", "offset_2"], ["last"], name="norm_2"),
        make("Gather", ["last", "first"], ["token"], name="class_token", axis=1),
        make("MatMul", ["token", "projection"], ["features"], name="projection"),
        make("ReduceL2", ["features", "axis"], ["length"], name="length", keepdims=1),
        make("Div", ["features", "length"], ["embedding"], name="unit"),
    ]
    constants = {
        "kernel": random.normal(size=(width, 3, 56, 56)) / 400,
        "weight_in": random.normal(size=(width, 64)) / 6,
        "bias_in": random.normal(size=64),
        "weight_out": random.normal(size=(64, width)) / 8,
        "bias_out": random.normal(size=width),
        "projection": random.normal(size=(width, 512)) / 6,
    }
    for index in range(3):
        constants[f"gain_{index}"] = 1 + random.normal(size=width) / 4
        constants[f"offset_{index}"] = random.normal(size=width) / 4
    constants["gain_0"][5] = 40
    whole = {"to_tokens": [0, 0, -1], "axis": [-1], "first": 0}
    initializer = [array(value.astype(np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 512])],
        [*initializer, *(array(np.array(value, np.int64), name) for name, value in whole.items())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(12, 224, 224, 3) uint8: images of coarse noise, so that they differ in more than fine detail."""
    random = np.random.default_rng(1)
    return np.kron(random.integers(0, 256, (12, 4, 4, 3)), np.ones((1, 56, 56, 1))).astype(np.uint8)


def types_of(model: "onnx.ModelProto") -> dict[str, str]:
    """Each computed tensor's element type, by name."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    name_of = onnx.TensorProto.DataType.Name
    return {v.name: name_of(v.type.tensor_type.elem_type) for v in [*inferred.value_info, *inferred.output]}


@pytest.mark.parametrize(("half", "name"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_matrices_are_lowered_and_the_rest_stays_in_fp32(block: "onnx.ModelProto", half: str, name: str) -> None:
    """LayerNorm, softmax, the residual stream and the L2 norm stay in FP32. Inputs and outputs do not change."""
    lowered = lower(block, half)
    onnx.checker.check_model(lowered, full_check=True)
    types = types_of(lowered)
    for node in lowered.graph.node:
        if node.op_type in ("MatMul", "Conv"):
            assert types[node.output[0]] == name, node.name
            assert {types.get(data, name) for data in node.input} == {name}, node.name
        if node.op_type in ("LayerNormalization", "Softmax", "Add", "ReduceL2", "Div"):
            assert types[node.output[0]] == "FLOAT", node.name
    assert lowered.graph.input == block.graph.input
    assert lowered.graph.output == block.graph.output
    assert count_matrices(lowered) == {half: 6}
    assert precision_of(lowered) == half
    assert precision_of(block) == "fp32"


def test_the_naive_conversion_leaves_nothing_in_fp32_but_the_output(block: "onnx.ModelProto") -> None:
    """docs/precision.md calls it FP16 throughout."""
    types = types_of(naive_half(block))
    assert {name for name, kind in types.items() if kind == "FLOAT"} == {"embedding"}


def test_folding_the_normalisation_changes_nothing(block: "onnx.ModelProto", pixels: np.ndarray) -> None:
    """The convolution's input is exact in BF16, because it is an integer divided by 128."""
    folded = fold_normalisation(block)
    assert [node.op_type for node in folded.graph.node].count("Div") == 1
    before, after = run_onnx(block, pixels).embeddings, run_onnx(folded, pixels).embeddings
    assert np.abs(before - after).max() < 1e-6  # FP32 in another order
    values = (np.arange(256, dtype=np.float32) - 128) / 128
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values)


def test_a_padded_convolution_is_not_folded(block: "onnx.ModelProto") -> None:
    """The zeros of the padding would stand for another colour after folding."""
    padded = onnx.ModelProto()
    padded.CopyFrom(block)
    conv = next(node for node in padded.graph.node if node.op_type == "Conv")
    conv.attribute.append(onnx.helper.make_attribute("pads", [1, 1, 1, 1]))
    assert fold_normalisation(padded) is padded


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_the_fp32_emulation_rounds_as_fp16_and_bf16_do(block: "onnx.ModelProto", pixels: np.ndarray, half: str) -> None:
    """The first product has the same bits as in numpy with explicit rounding."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    low = np.float16 if half == "fp16" else ml_dtypes.bfloat16
    lowered = lower(block, half)
    watched = emulate_in_fp32(lowered)
    watched.graph.output.append(onnx.helper.make_tensor_value_info("even", onnx.TensorProto.FLOAT, None))
    watched.graph.output.append(onnx.helper.make_tensor_value_info("qk", onnx.TensorProto.FLOAT, None))
    import onnxruntime

    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    even, product = session.run(["even", "qk"], {"pixels": pixels})
    weight = onnx.numpy_helper.to_array(next(t for t in block.graph.initializer if t.name == "weight_qk"))
    by_hand = (even.astype(low).astype(np.float32) @ weight.astype(low).astype(np.float32)).astype(low)
    same = by_hand.astype(np.float32) == product
    assert same.mean() > 0.99  # another order of the sum may round a tie differently
    run = run_onnx(lowered, pixels)
    assert run.how == EMULATED
    assert run_onnx(block, pixels).how == NATIVE
    assert 0 < np.abs(run.embeddings - run_onnx(block, pixels).embeddings).max() < 0.05


def test_a_weight_that_fp16_cannot_hold_is_refused(block: "onnx.ModelProto") -> None:
    """It would become infinite. BF16 has the range."""
    wide = onnx.ModelProto()
    wide.CopyFrom(block)
    tensor = next(t for t in wide.graph.initializer if t.name == "projection")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1e7, "projection"))
    with pytest.raises(ToolError, match=r"projection: a weight of .* does not fit fp16; use bf16"):
        lower(wide, "fp16")
    lower(wide, "bf16")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_layers_have_q_dq_pairs_and_embeddings_stay_close(
    block: "onnx.ModelProto", pixels: np.ndarray, tmp_path: Path, kind: str
) -> None:
    """Linear layers get Q/DQ pairs. Patch embedding, projection and attention's products are in FP16."""
    prepared = prepare(block, kind)
    calibration = calibrate(prepared, pixels, pixels, kind, folder=tmp_path)
    assert set(calibration.layers) == {node.name for node in linear_layers(prepared)} == {"qk", "out_matmul"}
    graph = lower(quantize(prepared, calibration.layers, kind), "fp16")
    onnx.checker.check_model(graph, full_check=True)
    assert count_matrices(graph) == {"fp16": 4, kind: 2}
    assert precision_of(graph) == kind
    found = agreement(run_onnx(graph, pixels).embeddings, run_onnx(block, pixels).embeddings)
    assert found.worst_cosine > 0.99


def test_calibration_is_cached_by_graph_and_images(
    block: "onnx.ModelProto", pixels: np.ndarray, tmp_path: Path
) -> None:
    """The same graph and images are not calibrated again; other images are."""
    told: list[str] = []

    def tell(what: str, _done: int, _total: int) -> None:
        told.append(what)

    prepared = prepare(block, "int8")
    first = calibrate(prepared, pixels[4:], pixels[:4], "int8", folder=tmp_path, tell=tell)
    assert told
    told.clear()
    again = calibrate(prepared, pixels[4:], pixels[:4], "int8", folder=tmp_path, tell=tell)
    assert not told
    assert again.costs == first.costs
    assert np.array_equal(again.layers["qk"].bias, first.layers["qk"].bias)
    calibrate(prepared, pixels[4:], pixels[1:4], "int8", folder=tmp_path, tell=tell)
    assert told


@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_a_truncated_calibration_file_is_made_again(
    block: "onnx.ModelProto", pixels: np.ndarray, tmp_path: Path, kept_bytes: int
) -> None:
    """The file is empty, or no longer a zip archive."""
    prepared = prepare(block, "int8")
    made = calibrate(prepared, pixels, pixels, "int8", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert calibrate(prepared, pixels, pixels, "int8", folder=tmp_path).costs == made.costs


def product_in_eight_bits(layer: QuantisedLayer, data: np.ndarray) -> np.ndarray:
    """The product that a layer's Q/DQ nodes compute in INT8, by numpy."""
    varying = data - layer.centre
    size = np.abs(varying).max(axis=-1, keepdims=True).clip(1e-6)
    return np.rint(varying / size * 127) / 127 * size @ (layer.levels * layer.weight_scales) + layer.bias


def test_an_outlier_channel_does_not_spoil_the_others() -> None:
    """One channel is 100 times the others. A fitted layer has less than a quarter of plain INT8's error."""
    random = np.random.default_rng(0)
    data = random.normal(size=(256, 64)).astype(np.float32)
    data[:, 7] = 100 + 10 * random.normal(size=256)
    weight = random.normal(size=(64, 32)).astype(np.float32)
    layer = fit(layer_statistics([data], [256]), weight, "int8")
    exact = data @ weight
    plain = np.abs(data).max() / 127
    naive = np.rint(data / plain) * plain @ weight
    fitted = product_in_eight_bits(layer, data)
    assert np.abs(naive - exact).mean() / exact.std() > 0.01
    assert np.abs(fitted - exact).mean() < np.abs(naive - exact).mean() / 4


@pytest.mark.parametrize("images_axis", [0, 1])
def test_a_nearly_constant_token_keeps_its_variation(images_axis: int) -> None:
    """One token is 5 and varies by 0.01, while the others vary by 1. Its variation is kept to within a hundredth."""
    random = np.random.default_rng(0)
    data = random.normal(size=(96, 20, 32)).astype(np.float32)  # (images, tokens, channels)
    data[:, 0] = 5 + data[:, 0] / 100
    weight = random.normal(size=(32, 24)).astype(np.float32)
    given = data if images_axis == 0 else data.transpose(1, 0, 2)
    layer = fit(layer_statistics(np.split(given, 2, axis=images_axis), [48, 48]), weight, "int8")
    token = np.s_[:, 0] if images_axis == 0 else np.s_[0]
    off = (product_in_eight_bits(layer, given) - given @ weight)[token]
    assert off.std() < 0.01 * (given @ weight)[token].std(axis=0).mean()


def test_constant_rows_do_not_affect_the_fit() -> None:
    """Most rows are the same in every image. The others stay as accurate. Data of constant rows alone is refused."""
    random = np.random.default_rng(0)
    data = random.normal(size=(64, 20, 32)).astype(np.float32)
    weight = random.normal(size=(32, 24)).astype(np.float32)
    still = data.copy()
    still[:, 5:] = 1
    off, off_beside = (
        np.abs(product_in_eight_bits(fit(layer_statistics([x], [64]), weight, "int8"), x) - x @ weight)[:, :5].mean()
        for x in (data[:, :5], still)
    )
    assert off_beside < 1.2 * off
    with pytest.raises(ToolError, match="all the same"):
        fit(layer_statistics([np.ones((8, 20, 32), np.float32)], [8]), weight, "int8")


def test_rows_larger_than_those_of_the_calibration_are_not_clipped() -> None:
    """A row ten times as large has about ten times the error."""
    random = np.random.default_rng(0)
    data, weight = random.normal(size=(256, 32)).astype(np.float32), random.normal(size=(32, 24)).astype(np.float32)
    layer = fit(layer_statistics([data], [256]), weight, "int8")
    rows = layer.centre + (data - layer.centre) * 10
    off, off_large = (np.abs(product_in_eight_bits(layer, x) - x @ weight).mean() for x in (data, rows))
    assert off_large < 11 * off


def test_a_rotated_stream_gives_the_same_embeddings_with_smaller_outliers(
    tower: "onnx.ModelProto", pixels: np.ndarray
) -> None:
    """The channels of the first linear layer's input are less than half as uneven."""
    turned = rotate(tower)
    onnx.checker.check_model(turned, full_check=True)
    before, after = run_onnx(tower, pixels).embeddings, run_onnx(turned, pixels).embeddings
    assert np.abs(before - after).max() < 1e-5  # FP32 in another order
    assert (
        {node.name for node in linear_layers(turned)} == {node.name for node in linear_layers(tower)} == {"in", "out"}
    )

    def unevenness(graph: "onnx.ModelProto") -> float:
        node = next(node for node in graph.graph.node if node.name == "in")
        reach = np.abs(np.concatenate(Stepwise(graph, pixels).run_to(node), axis=1)).max(axis=(0, 1))
        return float(reach.max() / np.median(reach))

    assert unevenness(turned) < unevenness(tower) / 2


def test_a_graph_of_another_form_is_not_rotated(block: "onnx.ModelProto") -> None:
    """A product reads its first norm, so the residual stream cannot be identified."""
    assert rotate(block) is block


@pytest.mark.parametrize(("axis", "turns"), [(1, True), (2, False)])
def test_a_stream_may_be_sliced_by_token_but_not_by_channel(tower: "onnx.ModelProto", axis: int, turns: bool) -> None:
    """Each channel of the rotated stream is a mixture of all channels."""
    sliced = onnx.ModelProto()
    sliced.CopyFrom(tower)
    nodes = {node.name: node for node in sliced.graph.node}
    bounds = {"slice_from": 0, "slice_to": 1, "slice_axis": axis}
    for name, value in bounds.items():
        sliced.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    nodes["norm_2"].input[0] = "chosen"
    at = list(sliced.graph.node).index(nodes["norm_2"])
    sliced.graph.node.insert(at, onnx.helper.make_node("Slice", ["stream", *bounds], ["chosen"], name="choose"))
    assert (rotate(sliced) is not sliced) == turns


def test_the_rotation_keeps_lengths_and_means() -> None:
    """This is why LayerNorm commutes with it."""
    turn = mean_keeping_rotation(48)
    assert np.allclose(turn @ turn.T, np.eye(48), atol=1e-12)
    row = np.random.default_rng(0).normal(size=48)
    assert np.isclose((row @ turn).mean(), row.mean())
    assert np.abs(turn).max() < 0.9  # it does mix the channels


def test_gptq_rounding_has_a_smaller_error_than_plain_rounding() -> None:
    """On correlated inputs, as a layer's are, less than a third of the error. Each weight is on the grid."""
    random = np.random.default_rng(0)
    rows = (random.normal(size=(2048, 16)) @ random.normal(size=(16, 64)) + random.normal(size=(2048, 64)) / 10).astype(
        np.float32
    )
    steps = (random.normal(size=(64, 24)) * 4).astype(np.float32)
    rounded = round_weights(steps, curvature(rows), np.rint)
    assert np.array_equal(rounded, np.rint(rounded))
    assert np.square(rows @ (rounded - steps)).mean() < np.square(rows @ (np.rint(steps) - steps)).mean() / 3


def test_weights_are_fitted_to_the_inputs_that_the_layer_will_get() -> None:
    """A channel whose input is halved gets twice the weight. The others keep theirs."""
    random = np.random.default_rng(0)
    exact = random.normal(size=(512, 8)).astype(np.float32)
    seen = exact * np.where(np.arange(8) == 3, 0.5, 1).astype(np.float32)
    weight = random.normal(size=(8, 4)).astype(np.float32)
    fitted = fit_weights(weight, exact, seen, curvature(seen))
    assert np.allclose(fitted[3], 2 * weight[3], rtol=0.05)  # damping makes it a little smaller
    assert np.allclose(np.delete(fitted, 3, 0), np.delete(weight, 3, 0), atol=0.05)


def test_a_graph_can_be_run_stepwise_from_any_node(block: "onnx.ModelProto", pixels: np.ndarray) -> None:
    """The embeddings are those of the whole graph, and a change to a part changes them."""
    images = Stepwise(block, pixels)
    whole = run_onnx(block, pixels).embeddings
    nodes = {node.name: node for node in block.graph.node}
    for name in ("conv", "qk", "out", "projection"):
        inputs = images.run_to(nodes[name])
        assert sum(map(len, inputs)) == (len(pixels) if name != "out" else 16 * len(pixels))
        assert np.allclose(images.finish(), whole, atol=1e-6)

    def without_bias(piece: "onnx.ModelProto") -> "onnx.ModelProto":
        for tensor in piece.graph.initializer:
            if tensor.name == "bias_out":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(32, np.float32), "bias_out"))
        return piece

    changed = Stepwise(block, pixels)
    changed.run_to(nodes["out"])
    changed.run_to(nodes["pool"], without_bias)
    assert np.abs(changed.finish() - whole).max() > 1e-3


@pytest.mark.parametrize(
    ("count", "seen", "held_out"), [(100, 75, 25), (512, 384, 128), (513, 384, 128), (5000, 384, 128)]
)
def test_a_quarter_of_the_images_is_held_out(count: int, seen: int, held_out: int) -> None:
    """The last quarter of at most 512 images, which are sampled evenly. No image is in both parts."""
    first, last = split(np.arange(count))
    assert (len(first), len(last)) == (seen, held_out)
    assert first.max() < last.min()


@pytest.mark.parametrize(
    ("worst", "mean", "unchanged", "holds"),
    [(0.986, 0.996, 0.99, True), (0.98, 0.996, 0.99, False), (0.986, 0.994, 0.99, False), (0.986, 0.996, 0.98, False)],
)
def test_a_mix_must_hold_with_a_margin(worst: float, mean: float, unchanged: float, holds: bool) -> None:
    """A mix may have half of the error that INT8's gate allows. All four here pass the gate itself."""
    found = Agreement(128, worst, mean, worst, 0.1, unchanged, 0.9, unchanged)
    assert not failures(found, GATES["int8"], trained=True)
    assert holds_with_margin(found, "int8") == holds


def test_mixes_first_leave_out_the_layers_with_the_highest_cost_per_weight() -> None:
    """From all layers down to the smallest mix with at least half of the graph's weights."""

    def layer(weights: int) -> QuantisedLayer:
        nothing = np.zeros(0, np.float32)
        return QuantisedLayer(nothing, nothing, np.zeros((1, weights), np.int8), nothing)

    costs = {"wide": 8e-6, "narrow": 3e-6, "cheap": 1e-6, "dear": 9e-6}
    calibration = Calibration({"wide": layer(40), "narrow": layer(10), "cheap": layer(10), "dear": layer(30)}, costs)
    assert [list(mix) for mix in calibration.mixes(100)] == [
        ["wide", "narrow", "cheap", "dear"],  # all layers: patch embedding and projection are not among them
        ["wide", "narrow", "cheap"],
        ["wide", "cheap"],
    ]


def test_likely_neighbours_kept_estimates_from_few_images_what_many_show() -> None:
    """The estimate from 60 images is close to the count over 1,500. Without errors all neighbours stay."""
    random = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    exact = unit(random.normal(size=(1500, 64)))
    got = unit(exact + random.normal(size=exact.shape) / 800)
    counted = agreement(got, exact).neighbours_kept
    assert 0.9 < counted < 0.99
    assert abs(likely_neighbours_kept(got[:60], exact[:60], exact) - counted) < 0.02
    assert likely_neighbours_kept(exact[:60], exact[:60], exact) == 1
    assert likely_neighbours_kept(exact[:2], exact[:2], exact) == 0  # too few to estimate


def test_a_swapped_tie_keeps_its_neighbour_but_still_counts_at_the_gate() -> None:
    """Two photographs are tied if their similarities to a third differ by 0.0008, and not if by 0.0012."""

    def near(*likeness: float) -> np.ndarray:
        """A first row, and one row with each of these cosines to it. In other directions they are orthogonal."""
        rows = np.zeros((1 + len(likeness), 512), np.float32)
        rows[0, 0] = 1
        for index, like in enumerate(likeness, 1):
            rows[index, 0], rows[index, index] = like, np.sqrt(1 - like**2)
        return rows

    turned = near(0.7, 0.701)
    tied = agreement(turned, near(0.7008, 0.7))
    assert tied.neighbours_kept == 1
    assert "neighbours kept 0.66670 is under 0.97" in "; ".join(failures(tied, GATES["int8"], trained=True))
    assert agreement(turned, near(0.7012, 0.7)).neighbours_kept < 1


@pytest.mark.parametrize(
    ("count", "force", "note"), [(8, True, "8"), (99, True, "99"), (100, False, "500"), (500, False, None)]
)
def test_calibration_needs_100_images_and_advises_500(count: int, force: bool, note: str | None) -> None:
    """Fewer than 100 are refused unless forced, fewer than 8 always. Fewer than 500 give a note."""
    said = check_count(count, force=force)
    assert said is None if note is None else note in (said or "")
    with pytest.raises(ToolError, match=r"at least 100 images, better 500.*--force"):
        check_count(99, force=False)
    with pytest.raises(ToolError, match="at least 8 images, got 7") as caught:
        check_count(7, force=True)
    assert caught.value.exit_code == 2


def test_a_nan_fails_the_gate() -> None:
    """NaN compares false with everything, so a careless comparison would let it pass a gate."""
    expected = np.eye(8, 512, dtype=np.float32)
    broken = expected.copy()
    broken[3] = np.nan
    found = agreement(broken, expected, tuple("abcdefgh"))
    assert found.worst_cosine == -1
    assert found.worst_images[0] == "d"
    assert failures(found, GATES["int8"], trained=True)


def test_swapped_images_lower_cosines_and_common_neighbours() -> None:
    """If images swap places, their cosines fall, and so does the share of common neighbours."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert agreement(rows, rows).top1_agreement == 1
    mixed = rows[::-1].copy()
    found = agreement(mixed, rows)
    assert found.worst_cosine < 0.2
    assert found.top5_agreement < 0.5
    with pytest.raises(ToolError, match=r"shape \(40, 512\), got \(39, 512\)"):
        agreement(rows[:39], rows)


def test_failures_name_the_figure_below_the_gate_and_untrained_or_few_images_do_not_count() -> None:
    """Neighbours are not compared for untrained weights: those differ by no more than rounding."""
    expected = np.eye(120, 512, dtype=np.float32)
    turned = np.roll(expected, 1, axis=1) * 0.1 + expected
    found = agreement(turned, expected)
    assert "worst cosine 0.995" in failures(found, GATES["fp16"], trained=True)[0]
    assert not [line for line in failures(found, GATES["int8"], trained=False) if "neighbours" in line]
    assert counts_for_nothing(120, trained=True) is None
    assert "untrained" in (counts_for_nothing(120, trained=False) or "")
    assert "99 images" in (counts_for_nothing(99, trained=True) or "")


def test_near_pixels_use_the_lower_of_two_gates() -> None:
    """For FP32 that is the gate of near pixels, for BF16 its own."""
    assert gate_of("fp32") == GATES["fp32"]
    assert gate_of("fp32", exact_pixels=False) == Gate(0.995, 0.999)
    assert gate_of("bf16", exact_pixels=False) == Gate(0.99, 0.999)


def test_docs_precision_has_the_gates_of_the_code() -> None:
    assert gates_table() in (ROOT / "docs" / "precision.md").read_text()
    assert set(GATES) == {"fp32", "fp16", "bf16", "int8", "fp8"}


def test_docs_precision_has_the_committed_results() -> None:
    assert results_table() in (ROOT / "docs" / "precision.md").read_text()


def test_a_gemm_is_split_into_one_product_and_one_sum(block: "onnx.ModelProto", pixels: np.ndarray) -> None:
    """So all linear layers have one form. The embeddings do not change."""
    split = split_gemm(block)
    assert "Gemm" not in {node.op_type for node in split.graph.node}
    assert np.abs(run_onnx(split, pixels).embeddings - run_onnx(block, pixels).embeddings).max() < 1e-6
