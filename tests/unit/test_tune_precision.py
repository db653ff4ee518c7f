"""`tune-precision`: a graph in parts gives the same vectors, and the fastest mix that passes the gate is served."""

import json
import shutil

import numpy as np
import pytest
from google.protobuf import json_format
from tests.small_graph import write_small_transformer
from typer.testing import CliRunner

from clip_tools.accuracy.gates import agreement, cosines
from clip_tools.accuracy.reference import Reference
from clip_tools.cli import app
from clip_tools.errors import ToolError
from clip_tools.export import tune_precision as verb
from clip_tools.export.export_onnx import make_manifest
from clip_tools.export.manifest import manifest_path
from clip_tools.export.mix import LayeredGraph, Mix, apply, check_name
from clip_tools.export.parts import cut, layers
from clip_tools.export.tune_precision import LayerCost, Tuning, embed
from clip_tools.measuring.onnx_profile import onnx_profile
from clip_tools.measuring.options import OnnxProfileOptions
from clip_tools.measuring.sections import precision_section
from clip_tools.oracle import Weights
from clip_tools.paths import MODELS
from clip_tools.repository import check_files, deployment, read_config
from ort_session import ConfigError, SessionChain, check_contract, open_session, session_settings

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")

NAMES = ["patches", "block 0, attention", "block 0, mlp up", "block 0, mlp down", "projection"]
MIX = ("fp32", "fp32", "bf16", "bf16", "fp32")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_small_transformer(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture(scope="module")
def model(path):
    return onnx.load(str(path))


@pytest.fixture(scope="module")
def expected(model) -> Reference:
    """Twenty images of coarse noise, and their embeddings by ONNX Runtime's own CPU provider."""
    import onnxruntime

    coarse = np.random.default_rng(1).integers(0, 256, (20, 7, 7, 3))
    pixels = np.kron(coarse, np.ones((1, 32, 32, 1))).astype(np.uint8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = tuple(f"{number}.jpg" for number in range(len(pixels)))
    return Reference(names, pixels, session.run(["embedding"], {"pixels": pixels})[0], "of no file")


@pytest.fixture
def repository_copy(tmp_path):
    """A writable copy of the committed model repository, without built files."""
    folder = tmp_path / "models"
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("*.onnx", "*.plan", "manifest*", "__pycache__"))
    return folder


def mix_of(precisions, worst_cosine: float, ratio: float) -> Mix:
    row = np.eye(2, dtype=np.float32)
    found = agreement(row, row)
    found = type(found)(**{**vars(found), "worst_cosine": worst_cosine})
    return Mix(tuple(precisions), 2, found, ratio, ratio, ratio, 10.0)


def test_each_product_with_weights_is_a_layer_and_attention_is_one_layer(model):
    """Cuts are where the fewest tensors cross: the residual stream alone, except within the MLP."""
    found = layers(model)
    assert [layer.name for layer in found] == NAMES
    assert [layer.first for layer in found] == [0, *(layer.end for layer in found[:-1])]
    given = [[tensor.name for tensor in part.graph.input] for part in cut(model, [one.first for one in found[1:]])]
    assert given == [["pixels"], ["tokens"], ["stream"], ["active", "stream"], ["pooled"]]


@pytest.mark.usefixtures("bf16")
def test_a_graph_in_parts_gives_the_same_vectors_as_the_whole(model, expected, tmp_path):
    """In FP32. Layers in BF16 change the vectors only a little."""
    whole = embed(LayeredGraph(model, tmp_path).open(["fp32"] * 5), expected.pixels)
    alternating = LayeredGraph(model, tmp_path).open(["fp32", "bf16", "fp32", "bf16", "fp32"])
    assert isinstance(alternating, SessionChain)
    assert cosines(whole, expected.embeddings).min() > 0.999999
    mixed = cosines(embed(alternating, expected.pixels), whole)
    assert 0.99 < mixed.min() < 0.9999999


@pytest.mark.usefixtures("bf16")
def test_tuning_measures_every_layer_and_finds_the_mix_at_the_gates_edge(model, expected):
    """The second gate is just above BF16 throughout, so the search must find a mix that passes."""
    first = verb.tune(model, expected, worst_cosine=0.5, rounds=1)
    throughout = first.mixes[-1]
    assert [layer.name for layer in first.layers] == NAMES and all(layer.fp32_ms > 0 for layer in first.layers)
    assert max(layer.cost for layer in first.layers) > 0
    assert (throughout.lowered, throughout.parts) == (5, 1)
    gate = (throughout.agreement.worst_cosine + 1) / 2
    second = verb.tune(model, expected, worst_cosine=gate, rounds=1)
    assert second.mixes[0].agreement.worst_cosine >= gate
    assert not second.mixes[-1].agreement.worst_cosine >= gate
    assert second.best is None or second.best.agreement.worst_cosine >= gate


@pytest.mark.usefixtures("openvino")
def test_a_graph_of_other_weights_is_refused(model, expected):
    other = Reference(expected.names, expected.pixels, expected.embeddings[::-1].copy(), "")
    with pytest.raises(ToolError, match="is it of these weights"):
        verb.tune(model, other, rounds=1)


def test_the_best_mix_is_the_fastest_that_passes_the_gate():
    plain, good, slow, fast = (
        mix_of(["fp32"] * 2, 1.0, 1.0),
        mix_of(["fp32", "bf16"], 0.9995, 1.4),
        mix_of(["bf16", "fp32"], 0.9999, 1.3),
        mix_of(["bf16"] * 2, 0.98, 2.0),
    )
    assert Tuning((), (plain, slow, good, fast), 0.999).best == good
    assert Tuning((), (plain, fast), 0.999).best is None
    assert LayerCost("a", 2.0, 2.5, 0.0).price == float("inf")


@pytest.mark.usefixtures("bf16")
def test_the_mix_is_written_as_a_configuration_that_the_backend_opens(path, model, expected, repository_copy):
    weights = Weights("ViT-B-32", "random:0")
    written = apply(mix_of(MIX, 0.9995, 1.4), path, weights, "mixed", "on a machine", repository_copy)
    folder = repository_copy / "clip_onnx" / "1"
    assert [one.name for one in written] == [*(f"model.mixed.part{n}.onnx" for n in (1, 2, 3)), "mixed.pbtxt"]
    config = json_format.MessageToDict(
        read_config(repository_copy, "clip_onnx", "mixed"), preserving_proto_field_name=True
    )
    settings = session_settings(config, "CPU", 0)
    assert settings.names == ["OpenVINO on the CPU in 3 parts, 1 of them in BF16"]
    session = open_session(folder / config["default_model_filename"], settings)
    check_contract(config, session)
    assert cosines(embed(session, expected.pixels), expected.embeddings).min() > 0.99
    # Applying another mix removes the old parts. BF16 throughout needs none.
    apply(mix_of(["bf16"] * 5, 0.9995, 2.0), path, weights, "mixed", "on a machine", repository_copy)
    assert list(folder.glob("*mixed*")) == []
    assert read_config(repository_copy, "clip_onnx", "mixed").default_model_filename == ""


@pytest.mark.parametrize(("name", "message"), [("Mixed", "lower-case"), ("cpu-bf16", "take another")])
def test_a_configuration_that_tune_precision_did_not_write_is_not_overwritten(name, message):
    with pytest.raises(ToolError, match=message):
        check_name(name, MODELS)


@pytest.mark.parametrize("parts", ["", "fp32 fp16", "f32"])
def test_an_unknown_precision_of_a_part_is_refused(parts):
    accelerator = {"name": "openvino_bf16", "parameters": {"parts": parts}}
    config = {"optimization": {"execution_accelerators": {"cpu_execution_accelerator": [accelerator]}}}
    with pytest.raises(ConfigError, match="parts, such as"):
        session_settings(config, "CPU", 0)


@pytest.mark.usefixtures("bf16")
def test_parts_of_two_graphs_and_a_missing_part_are_refused(model, path, repository_copy):
    apply(mix_of(MIX, 0.9995, 1.4), path, Weights("ViT-B-32", "random:0"), "mixed", "", repository_copy)
    folder = repository_copy / "clip_onnx" / "1"
    config = json_format.MessageToDict(
        read_config(repository_copy, "clip_onnx", "mixed"), preserving_proto_field_name=True
    )
    settings, first = session_settings(config, "CPU", 0), folder / "model.mixed.part1.onnx"
    (folder / "model.mixed.part2.onnx").unlink()
    with pytest.raises(ConfigError, match=r"part2.onnx is missing.*tune-precision --apply mixed"):
        open_session(first, settings)
    onnx.save(cut(model, [layers(model)[4].first])[1], str(folder / "model.mixed.part2.onnx"))
    with pytest.raises(ConfigError, match="the parts are not of one graph"):
        open_session(first, settings)


@pytest.mark.usefixtures("bf16")
def test_the_verb_writes_its_result_and_picture_but_applies_nothing_for_untrained_weights(
    path, expected, repository_copy, monkeypatch
):
    weights = Weights("ViT-B-32", "random:0")
    manifest_path(path).write_text(make_manifest(path, weights, "fp32", 1.0, 0.0).to_json())
    monkeypatch.setattr("clip_tools.accuracy.reference.reference", lambda *_: expected)
    output = repository_copy / "tuned.json"
    arguments = ["--onnx", str(path), "--output", str(output), "--models", str(repository_copy), "--rounds", "1"]
    options = ["--model", "ViT-B-32", "--pretrained", "random:0", "--worst-cosine", "0.9", "--apply", "mixed"]
    done = CliRunner().invoke(app, ["tune-precision", *arguments, *options])
    assert isinstance(done.exception, ToolError) and "untrained weights" in str(done.exception)
    result = json.loads(output.read_text())
    assert (result["kind"], len(result["layers"]), result["mixes"][-1]["lowered"]) == ("tune-precision", 5, 5)
    assert "<svg" in output.with_suffix(".svg").read_text()
    section = precision_section("tuned", result)
    assert "| 5 of 5 | 1 |" in section.text and "counts for nothing" in section.text
    assert not (repository_copy / "clip_onnx" / "configs" / "mixed.pbtxt").exists()


def test_a_cpu_without_bf16_is_refused_before_anything_is_measured(monkeypatch, openvino):
    monkeypatch.setattr("ort_session.computes_bf16", lambda: False)
    done = CliRunner().invoke(app, ["tune-precision"])
    assert isinstance(done.exception, ToolError) and done.exception.exit_code == 1
    assert "cannot be served here: openvino_bf16 is asked for, but OpenVINO has no BF16 on this CPU" in str(
        done.exception
    )


def test_onnx_profile_refuses_a_mix_and_a_missing_part_names_its_command(path, repository_copy):
    apply(mix_of(MIX, 0.9995, 1.4), path, Weights("ViT-B-32", "random:0"), "mixed", "", repository_copy)
    with pytest.raises(ToolError, match="'mixed' is a mix of precisions in several files"):
        onnx_profile(OnnxProfileOptions(models=repository_copy, config_name="mixed"))
    (repository_copy / "clip_onnx" / "1" / "model.mixed.part1.onnx").unlink()
    with pytest.raises(ToolError, match=r"part1.onnx.*make it with `clip-tools tune-precision --apply mixed`"):
        check_files(deployment(repository_copy, "mixed"))
