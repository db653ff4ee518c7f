"""`clip-tools verify` passes what agrees with open_clip and fails what does not: files, configurations, the command.

Whether the precisions pass their gates is asked of the tests' weights; how a failure shows, of `tiny-vit`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import TINY, with_image
from typer.testing import CliRunner

from clip_tools import photos
from clip_tools import verify as verifying
from clip_tools.accuracy.gates import cosines
from clip_tools.accuracy.sample import Sample
from clip_tools.accuracy.texts import texts
from clip_tools.cli import app
from clip_tools.errors import ToolError
from clip_tools.export.export_onnx import compare, write_graph
from clip_tools.export.manifest import Manifest, manifest_path
from clip_tools.export.precision import lower
from clip_tools.oracle import Oracle, Weights
from clip_tools.quantization import lower_precision as exporting
from clip_tools.quantization.lower_precision import export_lower_precision
from clip_tools.serving.engine import Engine, find_engine
from clip_tools.tensorrt.build_engine import PlanOptions
from clip_tools.tensorrt.plan_manifest import stale_reason
from clip_tools.verify import verify, verify_text

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")


@pytest.fixture(scope="module")
def fp16_model(gpu_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's graph in FP16."""
    path = tmp_path_factory.mktemp("fp16") / "model.fp16.onnx"
    onnx.save(lower(onnx.load(str(gpu_model)), "fp16"), str(path))
    return path


@pytest.fixture(scope="module")
def tiny_fp16_model(tiny_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "model.fp16.onnx"
    write_graph(tiny_oracle, path, "gpu")
    onnx.save(lower(onnx.load(str(path)), "fp16"), str(path))
    return path


def changed(model: Path, folder: Path, name: str, change) -> Path:
    """The graph with one constant changed."""
    graph = onnx.load(str(model))
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
    path = folder / "broken.onnx"
    onnx.save(graph, str(path))
    return path


def test_a_text_tower_is_compared_with_open_clip_on_texts(
    text_model: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "texts", lambda: texts()[::10])
    verdict = verify_text(Engine(file=text_model), weights)
    assert (verdict.passed, verdict.what, verdict.agreement.images) == (True, "texts", 12)
    assert verdict.counts_for_nothing
    wrong = changed(text_model, tmp_path, "position_embedding", lambda values: values[::-1].copy())
    assert not verify_text(Engine(file=wrong), weights).passed


def test_the_exported_graph_passes_as_fp32(onnx_model: Path, weights: Weights, demo_photos: list[Path]) -> None:
    """It does not count, because ten photographs are too few."""
    verdict = verify(Engine(file=onnx_model), weights, demo_photos)
    assert verdict.precision == "fp32"
    assert verdict.passed, verdict.failures
    assert verdict.agreement.top1_agreement == verdict.agreement.top5_agreement == 1
    expected = "untrained" if weights.seed is not None else "10 images are too few"
    assert expected in (verdict.counts_for_nothing or "")


def test_the_fp16_graph_passes_its_gate(fp16_model: Path, weights: Weights, demo_photos: list[Path]) -> None:
    """Emulated in FP32 with every product rounded to FP16. It fails the gate of FP32."""
    verdict = verify(Engine(file=fp16_model), weights, demo_photos)
    assert verdict.precision == "fp16"
    assert "rounded to FP16" in verdict.how
    assert verdict.passed, verdict.failures
    assert verdict.agreement.max_abs > 1e-6
    if weights.seed is None:
        assert not verify(Engine(file=fp16_model), weights, demo_photos, precision="fp32").passed


broken_weights = pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position", lambda value: np.roll(value, 1, axis=0)),
        ("projection_weight", lambda value: np.full_like(value, np.nan)),
    ],
)


@broken_weights
def test_a_broken_graph_fails(tiny_model: Path, demo_photos: list[Path], tmp_path: Path, name: str, change) -> None:
    """Positions in another order and NaN are errors that the gate must not take for low precision."""
    broken = changed(tiny_model, tmp_path, name, change)
    verdict = verify(Engine(file=broken), TINY, demo_photos)
    assert not verdict.passed
    assert "worst cosine" in verdict.failures[0]


@broken_weights
def test_a_broken_export_is_refused_by_its_own_comparison(
    tiny_oracle: Oracle, tiny_model: Path, demo_photos: list[Path], tmp_path: Path, name: str, change
) -> None:
    """It is not written. NaN is refused too, which Python's min and max would drop."""
    broken = changed(tiny_model, tmp_path, name, change)
    with pytest.raises(ToolError, match="drifts from PyTorch"):
        compare(tiny_oracle, broken, [demo_photos[0].read_bytes()])


def test_dynamic_int8_is_refused(trained: Weights, onnx_model: Path, demo_photos: list[Path], tmp_path: Path) -> None:
    """ONNX Runtime's dynamic quantisation of the whole graph. With untrained weights it would pass."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    path, source = tmp_path / "dynamic.onnx", tmp_path / "model.onnx"
    source.symlink_to(onnx_model)  # ONNX Runtime writes another file beside it
    quantization.quantize_dynamic(str(source), str(path), per_channel=True)
    verdict = verify(Engine(file=path), trained, demo_photos)
    assert verdict.precision == "int8"
    assert not verdict.passed


def test_the_command_writes_table_json_and_picture_and_exits_1_under_the_gate(
    tiny_model: Path, tiny_fp16_model: Path, demo_photos: list[Path], tmp_path: Path
) -> None:
    """A graph passes its gate, and a broken one fails FP32's."""
    folder = demo_photos[0].parent
    given = ["--images", str(folder), "--model", TINY.model, "--pretrained", TINY.pretrained]
    picture = tmp_path / "histogram.png"
    result = CliRunner().invoke(app, ["verify", "--engine", str(tiny_fp16_model), *given, "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["passed"]
    assert data["environment"]["cores"] >= 1
    assert data["agreement"]["images"] == 10
    assert "worst cosine" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    broken = changed(tiny_model, tmp_path, "position", lambda value: value[::-1].copy())
    output = tmp_path / "result.json"
    result = CliRunner().invoke(app, ["verify", "--engine", str(broken), *given, "--output", str(output)])
    assert isinstance(result.exception, ToolError)
    assert result.exception.exit_code == 1
    assert "under the gate of fp32: worst cosine" in str(result.exception)
    assert json.loads(output.read_text())["failures"]


def test_the_manifests_weights_are_used_and_other_weights_refused(
    onnx_model: Path, weights: Weights, demo_photos: list[Path]
) -> None:
    """A comparison with other weights says nothing about the engine."""
    if weights.seed is not None:
        assert verify(Engine(file=onnx_model), None, demo_photos).model == weights.model
    with pytest.raises(ToolError, match=r"was made of .* and is to be compared with"):
        verify(Engine(file=onnx_model), dataclasses.replace(weights, pretrained="random:12345"), demo_photos)


def test_an_upright_configuration_is_compared_with_open_clip_on_turned_images(tiny_model: Path, tmp_path: Path) -> None:
    """The photographs are stored rotated, as phones do. Upright ones would pass either way."""
    models = with_image(tmp_path / "models", tiny_model)
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, path in enumerate(photos.demo_photos()[:8]):
        exif = Image.Exif()
        exif[0x0112] = index + 1
        with Image.open(path) as photo:
            photo.convert("RGB").resize((400, 300)).save(folder / f"{index}.jpg", exif=exif)
    images = photos.images_in(folder)
    engine = Engine(config_name="upright", models=models)
    verdict = verify(engine, TINY, images)
    assert (verdict.orientation, verdict.failures) == ("exif", ())
    assert not verify(engine, TINY, images, orientation="ignore").passed
    kept = Sample.read(tiny_model)
    assert kept.upright_embeddings is not None
    assert cosines(kept.embeddings, kept.upright_embeddings).min() < 0.9999


def test_a_missing_engine_is_refused(tmp_path: Path) -> None:
    """A missing file, an unknown configuration, both options, or none."""
    with pytest.raises(ToolError, match="no such file"):
        find_engine(str(tmp_path / "model.onnx"), None)
    with pytest.raises(ToolError, match=r"expected a .onnx or .plan file, or a configuration to serve: default, "):
        find_engine("tensorflow", None)
    with pytest.raises(ToolError, match="either --engine or --url"):
        find_engine("default", "grpc://localhost:8001")
    path = tmp_path / "text.onnx"
    path.write_text("not a graph")
    with pytest.raises(ToolError, match=r"text.onnx is no ONNX file"):
        verify(Engine(file=path), Weights(pretrained="random:0"), [])


def test_a_plan_without_a_gpu_is_an_error_of_one_sentence(
    tmp_path: Path, weights: Weights, demo_photos: list[Path]
) -> None:
    """The error says where to run the command."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    with pytest.raises(ToolError, match="a plan runs on an NVIDIA GPU, and no GPU was found here"):
        verify(Engine(file=plan), weights, demo_photos, precision="fp16")
    with pytest.raises(ToolError, match="no manifest that says its precision"):
        verify(Engine(file=plan), weights, demo_photos)
    assert PlanOptions().command() in (stale_reason(plan) or "")


@pytest.fixture
def beside(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder that holds an FP32 graph, beside which a variant is written."""
    for path in (tiny_model, manifest_path(tiny_model)):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_a_variant_is_written_with_its_manifest(beside: Path, demo_photos: list[Path]) -> None:
    """`model.fp16.onnx` and `manifest.fp16.json` are written. The FP32 graph beside them stays."""
    manifest = export_lower_precision(TINY, "fp16", demo_photos, beside / "model.fp16.onnx")
    assert Manifest.read(beside / "model.fp16.onnx").sha256 == manifest.sha256
    assert (beside / "manifest.fp16.json").is_file()
    assert manifest.precision == "fp16"
    assert manifest.matrices == {"fp16": 15}
    assert not manifest.trained
    assert manifest.gate["counts_for_nothing"]
    assert Manifest.read(beside / "model.onnx").precision == "fp32"


def test_a_variant_under_its_gate_is_not_written(
    beside: Path, demo_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no file behind, and an earlier one stays."""

    def lower_wrongly(model, half):
        graph = lower(model, half)
        tensor = next(t for t in graph.graph.initializer if t.name == "position")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
        return graph

    monkeypatch.setattr(exporting, "lower", lower_wrongly)
    before = sorted(beside.iterdir())
    with pytest.raises(ToolError, match=r"the fp16 graph of .* fails its gate on 10 photographs: worst cosine"):
        export_lower_precision(TINY, "fp16", demo_photos, beside / "model.fp16.onnx")
    assert sorted(beside.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--precision", "int8"], "needs --calibration"),
        (["--precision", "fp16", "--calibration", "."], "takes no --calibration"),
        (["--precision", "int4"], "expected one of fp32, fp16, bf16, int8, fp8"),
    ],
)
def test_impossible_export_options_exit_2(arguments: list[str], reason: str) -> None:
    result = CliRunner().invoke(app, ["export-onnx", "--pretrained", "random:0", *arguments])
    assert isinstance(result.exception, ToolError)
    assert reason in str(result.exception)
    assert result.exception.exit_code == 2


def test_a_small_calibration_folder_is_refused(demo_photos: list[Path]) -> None:
    folder = str(demo_photos[0].parent)
    arguments = ["export-onnx", "--pretrained", "random:0", "--precision", "int8", "--calibration", folder]
    result = CliRunner().invoke(app, arguments)
    assert "expected at least 100 images, better 500" in str(result.exception)
