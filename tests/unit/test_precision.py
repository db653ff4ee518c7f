"""The graph passes: what is lowered, what stays in FP32, what a twin shows; the gates and the calibration."""

from pathlib import Path

import numpy as np
import pytest

from clip_tools.engines.calibration import Calibration, calibrate, check_count
from clip_tools.engines.gates import GATES, agreement, counts_for_nothing, failures, gates_table
from clip_tools.engines.onnx_runner import NATIVE, TWIN, run_onnx
from clip_tools.engines.precision import (
    count_matrices,
    fold_normalisation,
    lower,
    naive_half,
    precision_of,
    split_gemm,
    twin,
)
from clip_tools.engines.quantize import LayerStatistics, fit, linear_layers, prepare, quantize
from clip_tools.errors import ToolError
from clip_tools.paths import ROOT
from clip_tools.precision_results import results_table

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")


@pytest.fixture(scope="module")
def block() -> "onnx.ModelProto":
    """One transformer block in small, from our pixels to our embedding, with every kind of node of the real graph."""
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
def pixels() -> np.ndarray:
    """12 images of coarse noise, so that they differ in more than grain."""
    random = np.random.default_rng(1)
    return np.kron(random.integers(0, 256, (12, 4, 4, 3)), np.ones((1, 56, 56, 1))).astype(np.uint8)


def types_of(model: "onnx.ModelProto") -> dict[str, str]:
    """Each computed tensor's element type, by name."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    name_of = onnx.TensorProto.DataType.Name
    return {v.name: name_of(v.type.tensor_type.elem_type) for v in [*inferred.value_info, *inferred.output]}


@pytest.mark.parametrize(("half", "name"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_matrices_are_lowered_and_the_rest_stays_in_fp32(block: "onnx.ModelProto", half: str, name: str) -> None:
    """LayerNorm, softmax, the residual stream and the norm in FP32; inputs and outputs as they were."""
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
    """It is what the README's table calls FP16 throughout."""
    types = types_of(naive_half(block))
    assert {name for name, kind in types.items() if kind == "FLOAT"} == {"embedding"}


def test_folding_the_normalisation_changes_nothing(block: "onnx.ModelProto", pixels: np.ndarray) -> None:
    """And the convolution's input is exact in BF16: whole numbers over 128."""
    folded = fold_normalisation(block)
    assert [node.op_type for node in folded.graph.node].count("Div") == 1
    before, after = run_onnx(block, pixels).embeddings, run_onnx(folded, pixels).embeddings
    assert np.abs(before - after).max() < 1e-6  # FP32 in another order
    values = (np.arange(256, dtype=np.float32) - 128) / 128
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values)


def test_a_padded_convolution_is_not_folded(block: "onnx.ModelProto") -> None:
    """Its padding is black before the normalisation, so it would be another image."""
    padded = onnx.ModelProto()
    padded.CopyFrom(block)
    conv = next(node for node in padded.graph.node if node.op_type == "Conv")
    conv.attribute.append(onnx.helper.make_attribute("pads", [1, 1, 1, 1]))
    assert fold_normalisation(padded) is padded


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_the_twin_computes_what_the_low_types_would(block: "onnx.ModelProto", pixels: np.ndarray, half: str) -> None:
    """Against numpy, rounding by hand: the same bits after the first convolution's rounding and the first product."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    low = np.float16 if half == "fp16" else ml_dtypes.bfloat16
    lowered = lower(block, half)
    watched = twin(lowered)
    watched.graph.output.append(onnx.helper.make_tensor_value_info("even", onnx.TensorProto.FLOAT, None))
    watched.graph.output.append(onnx.helper.make_tensor_value_info("qk", onnx.TensorProto.FLOAT, None))
    import onnxruntime

    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    even, product = session.run(["even", "qk"], {"pixels": pixels})
    weight = onnx.numpy_helper.to_array(next(t for t in block.graph.initializer if t.name == "weight_qk"))
    by_hand = (even.astype(low).astype(np.float32) @ weight.astype(low).astype(np.float32)).astype(low)
    same = by_hand.astype(np.float32) == product
    assert same.mean() > 0.99  # the sum's order may turn a tie
    run = run_onnx(lowered, pixels)
    assert run.how == TWIN
    assert run_onnx(block, pixels).how == NATIVE
    assert 0 < np.abs(run.embeddings - run_onnx(block, pixels).embeddings).max() < 0.05


def test_a_weight_that_fp16_cannot_hold_is_refused(block: "onnx.ModelProto") -> None:
    """It would be infinite; BF16 has the range."""
    wide = onnx.ModelProto()
    wide.CopyFrom(block)
    tensor = next(t for t in wide.graph.initializer if t.name == "projection")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1e7, "projection"))
    with pytest.raises(ToolError, match=r"projection: a weight of .* does not fit fp16; take bf16"):
        lower(wide, "fp16")
    lower(wide, "bf16")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_layers_have_explicit_pairs_and_stay_near(
    block: "onnx.ModelProto", pixels: np.ndarray, tmp_path: Path, kind: str
) -> None:
    """Q/DQ around the linear layers, patch embedding and projection left alone, attention's products in FP16."""
    prepared = prepare(block)
    calibration = calibrate(prepared, pixels, kind, folder=tmp_path)
    assert set(calibration.layers) == {node.name for node in linear_layers(prepared)} == {"qk", "out_matmul"}
    graph = lower(quantize(prepared, calibration.layers, kind), "fp16")
    onnx.checker.check_model(graph, full_check=True)
    assert count_matrices(graph) == {"fp16": 4, kind: 2}
    assert precision_of(graph) == kind
    found = agreement(run_onnx(graph, pixels).embeddings, run_onnx(block, pixels).embeddings)
    assert found.worst_cosine > 0.99


def test_calibration_is_kept_by_content(block: "onnx.ModelProto", pixels: np.ndarray, tmp_path: Path) -> None:
    """The same graph and images: nothing is watched again; other images: it is."""
    told: list[str] = []

    def tell(what: str, _done: int, _total: int) -> None:
        told.append(what)

    prepared = prepare(block)
    first = calibrate(prepared, pixels, "int8", folder=tmp_path, advance=tell)
    assert told
    told.clear()
    again = calibrate(prepared, pixels, "int8", folder=tmp_path, advance=tell)
    assert not told
    assert again.costs == first.costs
    assert np.array_equal(again.layers["qk"].bias, first.layers["qk"].bias)
    calibrate(prepared, pixels[::-1], "int8", folder=tmp_path, advance=tell)
    assert told


def test_an_outlier_channel_does_not_take_the_others_along() -> None:
    """One channel 100 times the others: plain INT8 loses a tenth of the product, the fitted scales a hundredth."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(256, 64)).astype(np.float32)
    rows[:, 7] = 100 + 10 * random.normal(size=256)
    weight = random.normal(size=(64, 32)).astype(np.float32)
    layer = fit(LayerStatistics(rows.min(axis=0), rows.max(axis=0), rows), weight, "int8")
    exact = rows @ weight
    plain = np.abs(rows).max() / 127
    naive = np.rint(rows / plain) * plain @ weight
    even = (rows - layer.shift) / layer.smooth
    steps = np.clip(np.rint(even / layer.scale), -128, 127) * layer.scale
    moved = weight * layer.smooth[:, None]
    rounded = np.rint(moved / layer.weight_scales) * layer.weight_scales
    fitted = steps @ rounded + layer.bias
    spread = exact.std()
    assert np.abs(naive - exact).mean() / spread > 0.01
    assert np.abs(fitted - exact).mean() < np.abs(naive - exact).mean() / 4


def test_the_mixes_leave_out_the_dearest_layers_first() -> None:
    """From every layer down to half of them."""
    layers = dict.fromkeys("abcdefghij")
    calibration = Calibration(layers, {name: 1e-5 * index for index, name in enumerate("jihgfedcba")})
    mixes = [set(mix) for mix in calibration.mixes()]
    assert mixes[0] == set(layers)
    assert mixes[1] == set(layers) - {"a"}
    assert mixes[-1] == set("fghij")


@pytest.mark.parametrize(("count", "force", "note"), [(99, True, "99"), (100, False, "500"), (500, False, None)])
def test_how_many_images_a_calibration_wants(count: int, force: bool, note: str | None) -> None:
    """Under 100 it is refused unless forced; under 500 it says so."""
    said = check_count(count, force=force)
    assert said is None if note is None else note in (said or "")
    with pytest.raises(ToolError, match=r"at least 100 images, better 500.*--force"):
        check_count(99, force=False)


def test_a_nan_is_no_agreement() -> None:
    """NaN compares false with everything, so it must not slip under a gate."""
    expected = np.eye(8, 512, dtype=np.float32)
    broken = expected.copy()
    broken[3] = np.nan
    found = agreement(broken, expected, tuple("abcdefgh"))
    assert found.worst_cosine == -1
    assert found.worst_images[0] == "d"
    assert failures(found, "int8", trained=True)


def test_neighbours_are_compared_as_sets_of_the_nearest() -> None:
    """Two images that change places: their own cosines fall, and the neighbours of all that were near them."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert agreement(rows, rows).top1_agreement == 1
    mixed = rows[::-1].copy()
    found = agreement(mixed, rows)
    assert found.worst_cosine < 0.2
    assert found.top5_agreement < 0.5
    with pytest.raises(ToolError, match=r"shape \(40, 512\), came \(39, 512\)"):
        agreement(rows[:39], rows)


def test_a_gate_says_what_is_under_it_and_when_it_counts_for_nothing() -> None:
    """Untrained neighbours lie within rounding of each other, so they are not looked at."""
    expected = np.eye(120, 512, dtype=np.float32)
    turned = np.roll(expected, 1, axis=1) * 0.1 + expected
    found = agreement(turned, expected)
    assert "worst cosine 0.995" in failures(found, "fp16", trained=True)[0]
    assert not [line for line in failures(found, "int8", trained=False) if "neighbours" in line]
    assert counts_for_nothing(120, trained=True) is None
    assert "untrained" in (counts_for_nothing(120, trained=False) or "")
    assert "99 images" in (counts_for_nothing(99, trained=True) or "")


def test_the_readme_has_the_gates_as_the_code_has_them() -> None:
    """One home for these numbers."""
    assert gates_table() in (ROOT / "README.md").read_text()
    assert set(GATES) == {"fp32", "fp16", "bf16", "int8", "fp8"}


def test_the_readme_has_the_measured_precisions_as_they_were_committed() -> None:
    """The README's figures are those of docs/results."""
    assert results_table() in (ROOT / "README.md").read_text()


def test_a_gemm_is_one_product_and_one_sum(block: "onnx.ModelProto", pixels: np.ndarray) -> None:
    """The numbers stay; linear layers have one form."""
    split = split_gemm(block)
    assert "Gemm" not in {node.op_type for node in split.graph.node}
    assert np.abs(run_onnx(split, pixels).embeddings - run_onnx(block, pixels).embeddings).max() < 1e-6
