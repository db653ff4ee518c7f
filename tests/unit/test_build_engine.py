"""`clip-tools build-engine` writes only a plan of the requested precision; stale plans are refused. Needs no GPU."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clip_tools.cli import app
from clip_tools.errors import ToolError
from clip_tools.export.precision import count_weights, lower
from clip_tools.gpu import Gpu
from clip_tools.repository import deployment
from clip_tools.serving.manifests import check_plans
from clip_tools.tensorrt import plan_manifest
from clip_tools.tensorrt.build_engine import PlanManifest, PlanOptions, _configure, build_engine, stale_reason
from clip_tools.tensorrt.census import Census, count_engine
from clip_tools.tensorrt.runtime import load_tensorrt

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'clip-embed[rtx]'",
)
RTX = PlanOptions(runtime="tensorrt-rtx", precision="fp16", max_batch=4, opt_batch=2)


@pytest.fixture(scope="module")
def small() -> "onnx.ModelProto":
    """A small graph with our tensors: a patch convolution, one linear layer, a norm."""
    helper, constant = onnx.helper, onnx.numpy_helper.from_array
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["whole"], name="to_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["whole"], ["planes"], name="permute", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["patches"], name="conv", strides=[32, 32]),
        helper.make_node("Reshape", ["patches", "flat"], ["tokens"], name="flatten"),
        helper.make_node("MatMul", ["tokens", "weight"], ["features"], name="linear"),
        helper.make_node("ReduceL2", ["features", "axes"], ["length"], name="norm", keepdims=1),
        helper.make_node("Div", ["features", "length"], ["embedding"], name="unit"),
    ]
    constants = {
        "kernel": random.normal(size=(8, 3, 32, 32)).astype(np.float32) / 1000,
        "flat": np.array([0, -1], np.int64),
        "weight": random.normal(size=(8 * 49, 512)).astype(np.float32),
        "axes": np.array([1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 512])],
        [constant(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def repository(small: "onnx.ModelProto", tmp_path: Path) -> Path:
    """A repository whose `clip_onnx` holds the small graph in FP32 and FP16; `clip_trt` has no plan yet."""
    folder = tmp_path / "clip_onnx" / "1"
    folder.mkdir(parents=True)
    onnx.save(small, str(folder / "model.onnx"))
    onnx.save(lower(small, "fp16"), str(folder / "model.fp16.onnx"))
    return tmp_path


@rtx
def test_the_exported_graph_becomes_an_engine_of_the_requested_precision(
    gpu_model: Path, onnx_model: Path, tmp_path: Path
) -> None:
    """NVIDIA's parser accepts the real graph, and all its matrix multiplications run in FP16."""
    graph = tmp_path / "model.fp16.onnx"
    onnx.save(lower(onnx.load(str(gpu_model)), "fp16"), str(graph))
    plan = tmp_path / "model.plan"
    manifest = build_engine(graph, plan, PlanOptions(runtime="tensorrt-rtx", precision="fp16"))
    assert manifest.matrices == {"fp16": 75}  # 12 x (4 linear, 2 of attention), the last query, patches, projection
    assert manifest.weights == {"fp16": count_weights(onnx.load(str(onnx_model)))}
    assert PlanManifest.read(plan) == manifest
    assert plan.stat().st_size == manifest.size_bytes
    assert stale_reason(plan, onnx_path=graph) is None
    assert "was built from another model.fp16.onnx" in (stale_reason(plan, onnx_path=onnx_model) or "")


@rtx
def test_fp32_is_not_tf32() -> None:
    """TensorRT's default for FP32 is TF32, which has the mantissa of FP16."""
    trt = load_tensorrt("tensorrt-rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config, _ = _configure(trt, builder, PlanOptions(runtime="tensorrt-rtx"), None, (224, 224, 3))
    assert not config.get_flag(trt.BuilderFlag.TF32)


@rtx
def test_a_graph_of_another_precision_fails_the_command(repository: Path) -> None:
    """With --precision fp16 and an FP32 graph it exits 1, names both precisions and writes nothing."""
    plan = repository / "clip_trt" / "1" / "model.plan"
    arguments = ["build-engine", "--runtime", "tensorrt-rtx", "--precision", "fp16", "--output", str(plan)]
    result = CliRunner().invoke(app, [*arguments, "--onnx", str(repository / "clip_onnx" / "1" / "model.onnx")])
    assert isinstance(result.exception, ToolError)
    assert result.exception.exit_code == 1
    assert re.search(r"asked for fp16, and the matrices run 2 in fp32; nothing was written", str(result.exception))
    assert not list(repository.glob("clip_trt/**/*.*"))


@rtx
def test_the_command_prints_the_census_and_the_manifest(repository: Path) -> None:
    """The manifest goes to stdout, the table of the census to stderr."""
    plan = repository / "clip_trt" / "1" / "model.plan"
    arguments = ["build-engine", "--runtime", "tensorrt-rtx", "--output", str(plan), "--target", "8.9"]
    result = CliRunner().invoke(app, [*arguments, "--onnx", str(repository / "clip_onnx" / "1" / "model.fp16.onnx")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["matrices"] == {"fp16": 2}
    assert json.loads(result.stdout)["targets"] == ["8.9"]
    assert "Matrix multiplications in fp16" in result.stderr


@rtx
def test_a_node_that_the_parser_refuses_is_named(small: "onnx.ModelProto", tmp_path: Path) -> None:
    """The message has the node, its operator, the parser's reason and what to do."""
    broken = onnx.ModelProto()
    broken.CopyFrom(small)
    broken.graph.node[4].op_type = "MatMulNBitsOfMine"
    broken.graph.node[4].domain = "example"
    path = tmp_path / "broken.onnx"
    onnx.save(broken, str(path))
    with pytest.raises(ToolError, match=r"node 'linear' \(MatMulNBitsOfMine\): .*clip-tools export-onnx"):
        build_engine(path, tmp_path / "model.plan", RTX)


@rtx
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_batch": 8}, "1 <= --min-batch <= --opt-batch <= --max-batch, got 8, 2, 4"),
        ({"targets": ("9.0",)}, "--target 9.0: .* builds fp16 for 7.5, 8.0"),
        ({"hardware_compatible": True}, "--hardware-compatible is for tensorrt"),
    ],
)
def test_invalid_options_are_refused_before_building(repository: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ToolError, match=reason) as refused:
        build_engine(
            repository / "clip_onnx" / "1" / "model.fp16.onnx",
            repository / "model.plan",
            dataclasses.replace(RTX, **changes),
        )
    assert refused.value.exit_code == 2


def test_the_error_for_a_missing_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(ToolError, match=r"tensorrt is not installed .*: make setup-trt"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.plan", PlanOptions())


@rtx
def test_serve_refuses_a_stale_plan_and_can_build_it_again(
    repository: Path, small: "onnx.ModelProto", monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the graph has changed, the error is one line with the command; --rebuild-stale uses the new graph."""
    graph, plan = repository / "clip_onnx" / "1" / "model.fp16.onnx", repository / "clip_trt" / "1" / "model.plan"
    build_engine(graph, plan, dataclasses.replace(RTX, targets=("8.9",)))
    models = [dataclasses.replace(model, file=plan) for model in deployment_of_trt()]
    check_plans(models)
    onnx.save(lower(small, "fp16", keep=["conv"]), str(graph))
    with pytest.raises(
        ToolError, match=r"another model.fp16.onnx .*clip-tools build-engine .*--rebuild-stale"
    ) as stale:
        check_plans(models)
    assert "\n" not in str(stale.value)
    with pytest.raises(ToolError, match="asked for fp16, and the matrices run 1 in fp"):
        check_plans(models, rebuild=True)
    assert "another model.fp16.onnx" in (stale_reason(plan) or "")
    onnx.save(lower(small, "fp16"), str(graph))
    plan.write_bytes(b"not that plan")
    assert "is not the file that its manifest describes" in (stale_reason(plan) or "")
    check_plans(models, rebuild=True)
    assert stale_reason(plan) is None


def deployment_of_trt() -> list:
    """The model of the committed `trt` deployment that runs a plan."""
    from clip_tools.paths import MODELS

    return [model for model in deployment(MODELS, "trt") if model.config.backend == "tensorrt"]


BUILT = PlanManifest(
    sha256="",
    onnx="model.fp16.onnx",
    onnx_sha256="",
    runtime="tensorrt",
    runtime_version="10.13.3.9",
    cuda="13.0",
    gpu="NVIDIA L4",
    compute_capability="8.9",
    targets=(),
    precision="fp16",
    min_batch=1,
    opt_batch=16,
    max_batch=64,
    workspace_mib=None,
    version_compatible=False,
    hardware_compatible=False,
    matrices={"fp16": 75},
    weights={"fp16": 87_800_000},
    build_s=60.0,
    size_bytes=4,
    date="",
)


def test_an_earlier_versions_manifest_is_still_read(tmp_path: Path) -> None:
    """It has a removed field and lacks a new one, but its plan is still valid."""
    fields = {name: value for name, value in json.loads(BUILT.to_json()).items() if name != "weights"}
    (tmp_path / "manifest.json").write_text(json.dumps({**fields, "matrices_with_weights": {"fp16": 51}}))
    assert PlanManifest.read(tmp_path / "model.plan") == dataclasses.replace(BUILT, weights={})


@pytest.mark.parametrize(
    ("changes", "version", "gpu", "reason"),
    [
        ({}, "10.13.3.9", Gpu("NVIDIA L4", "8.9", "13.0"), None),
        ({}, None, None, None),
        ({}, "10.14.1.48", None, "was built by tensorrt 10.13.3.9, but 10.14.1.48 is installed"),
        ({"version_compatible": True}, "10.14.1.48", None, None),
        ({"version_compatible": True}, "11.0.0.1", None, "was built by tensorrt 10.13.3.9"),
        ({}, None, Gpu("NVIDIA A10", "8.6", "13.0"), r"was built on NVIDIA L4 \(compute capability 8.9\)"),
        ({"hardware_compatible": True}, None, Gpu("NVIDIA A10", "8.6", "13.0"), None),
        ({"targets": ("8.9",)}, None, Gpu("NVIDIA A10", "8.6", "13.0"), "for compute capability 8.9, but this machine"),
        ({"targets": ("8.6",)}, None, Gpu("NVIDIA A10", "8.6", "13.0"), None),
    ],
)
def test_a_plan_of_another_version_or_gpu_is_stale(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    version: str | None,
    gpu: Gpu | None,
    reason: str | None,
) -> None:
    """Only an installed library and a present GPU are compared. The reason names the difference and the command."""
    plan = tmp_path / "clip_trt" / "1" / "model.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"plan")
    manifest = dataclasses.replace(BUILT, sha256=plan_manifest.sha256_of(plan), **changes)
    plan.with_name("manifest.json").write_text(manifest.to_json())
    monkeypatch.setattr(plan_manifest, "installed_version", lambda runtime: version)
    monkeypatch.setattr(plan_manifest, "find_gpu", lambda: gpu)
    found = stale_reason(plan)
    if reason is None:
        assert found is None
    else:
        assert re.search(rf"{reason}.*build it again with `clip-tools build-engine --runtime tensorrt", found or "")


def test_a_plan_without_a_manifest_is_stale(tmp_path: Path) -> None:
    """Nothing else says what it was built for."""
    assert "has no manifest.json beside it" in (stale_reason(tmp_path / "clip_trt" / "1" / "model.plan") or "")


def test_the_command_to_rebuild_has_the_options_that_differ_from_the_defaults() -> None:
    options = PlanOptions(runtime="tensorrt-rtx", max_batch=32, version_compatible=True, targets=("8.9", "12.0"))
    assert options.command() == (
        "clip-tools build-engine --runtime tensorrt-rtx --precision fp16 --max-batch 32 --version-compatible "
        "--target 8.9 --target 12.0"
    )


@pytest.mark.parametrize(
    ("matrices", "weights", "precision", "mismatch"),
    [
        ({"fp16": 75}, {"fp16": 51}, "fp16", None),
        ({"fp16": 73, "fp32": 1}, {"fp16": 49, "fp32": 1}, "fp16", "73 in fp16, 1 in fp32"),
        ({"int8": 44, "fp16": 30}, {"int8": 44, "fp16": 6}, "int8", None),
        ({"int8": 20, "fp16": 54}, {"int8": 20, "fp16": 30}, "int8", "40% of the weights are multiplied in int8"),
        ({"int8": 44, "fp32": 30}, {"int8": 44, "fp32": 6}, "int8", "30 in fp32"),
        ({}, {}, "fp32", "no matrix multiplication"),
    ],
)
def test_the_census_detects_another_precision_than_the_requested_one(
    matrices: dict[str, int], weights: dict[str, int], precision: str, mismatch: str | None
) -> None:
    """One FP32 matrix is a mismatch for FP16. INT8 allows FP16 for attention, but not for most of the weights."""
    found = Census(matrices, weights).mismatch(precision)
    assert found is None if mismatch is None else mismatch in (found or "")


def test_the_inspectors_layers_are_counted_by_output_type() -> None:
    """The JSON is that of TensorRT's inspector for an engine with DETAILED verbosity."""
    layer = {"Name": "x", "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear Half"}]}
    text = json.dumps({"Layers": [layer, layer, "a layer without details"]})
    assert count_engine(text) == {"Half": 2}
