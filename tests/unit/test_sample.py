"""The sample beside an exported graph: a server or new engine is verified with it before it is used."""

import dataclasses
import json
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from clip_tools.accuracy.sample import FILE, Sample, write_sample
from clip_tools.digest import sha256_of
from clip_tools.export.export_onnx import make_manifest
from clip_tools.export.manifest import manifest_path
from clip_tools.oracle import Weights
from clip_tools.paths import MODELS
from clip_tools.serving.engine import Engine, unchanged_graph_of
from clip_tools.serving.vector_check import WrongVectors, check_vectors
from clip_tools.tensorrt.plan_manifest import PlanManifest

NPY = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }".ljust(128) + b"\n1"
WEIGHTS = Weights("ViT-B-32", "laion2b_s34b_b79k")


def write_graph(folder, name="model.onnx", precision="fp32", weights=WEIGHTS):
    """Write a file with the manifest of an exported graph."""
    path = folder / "clip_onnx" / "1" / name
    path.write_bytes(name.encode())
    manifest_path(path).write_text(make_manifest(path, weights, precision, 1.0, 0.0).to_json())
    return path


@pytest.fixture
def sample():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(10, 512)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    files = tuple(b"\xff\xd8" + bytes(length) for length in range(10))  # of different lengths, zeros at the end
    pixels = random.integers(0, 256, (10, 224, 224, 3), dtype=np.uint8)
    return Sample((WEIGHTS.model, WEIGHTS.pretrained), files, pixels, embeddings)


@pytest.fixture
def models(tmp_path, sample):
    """A model repository with graphs in two precisions and their sample."""
    folder = tmp_path / "models"
    built = shutil.ignore_patterns("*.onnx", "*.plan", "manifest*", FILE, "__pycache__")
    shutil.copytree(MODELS, folder, ignore=built)
    for name, precision in (("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")):
        graph = write_graph(folder, name, precision)
    sample.write(graph)
    return folder


def off_by(cosine):
    """A fake engine whose vectors have this cosine to open_clip's."""

    def embed(sample):
        other = np.roll(sample.embeddings, 1, axis=1)
        other -= (other * sample.embeddings).sum(axis=1, keepdims=True) * sample.embeddings
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        return (cosine * sample.embeddings + np.sqrt(1 - cosine**2) * other).astype(np.float32)

    return embed


def test_a_sample_is_read_as_it_was_written(models, sample):
    kept = Sample.read(models / "clip_onnx" / "1" / "model.onnx")
    assert (kept.weights, kept.files) == (sample.weights, sample.files)
    assert np.array_equal(kept.inputs, sample.inputs)
    assert np.array_equal(kept.embeddings, sample.embeddings)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", NPY, None])
def test_without_a_readable_sample_the_vectors_are_not_verified(models, content):
    path = models / "clip_onnx" / "1" / FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert Sample.read(path.with_name("model.onnx")) is None
    said = check_vectors(Engine(models=models), off_by(0.0))
    assert f"were not verified against open_clip: {path.parent} has no {FILE} of these weights" in said
    assert f"export {WEIGHTS.model}, {WEIGHTS.pretrained}, again" in said


def test_an_incomplete_sample_is_not_used(models, sample):
    graph = models / "clip_onnx" / "1" / "model.onnx"
    dataclasses.replace(sample, embeddings=sample.embeddings[:9]).write(graph)
    assert Sample.read(graph) is None


@pytest.mark.parametrize(
    ("config_name", "cosine", "gate"),
    [
        (None, 0.999985, "worst cosine 0.99998 is under 0.99999, the gate of fp32,"),
        ("ort-fp16", 0.998005, "worst cosine 0.99800 is under 0.999, the gate of fp16,"),
        ("cpu-bf16", 0.980005, "worst cosine 0.98000 is under 0.99, the gate of bf16,"),
        ("fast", 0.994005, "worst cosine 0.99400 is under 0.995, the gate of fp32, near pixels,"),
    ],
)
def test_each_configuration_has_its_own_gate(models, config_name, cosine, gate):
    engine = Engine(models=models, config_name=config_name)
    with pytest.raises(
        WrongVectors, match=rf"do not match open_clip's: {gate} on 10 photographs.*CLIP_CHECK_VECTORS=0"
    ):
        check_vectors(engine, off_by(cosine))
    assert "the vectors match open_clip's: worst cosine 0.9999" in check_vectors(engine, off_by(0.999995))


def test_an_engine_that_gets_exact_pixels_must_pass_the_stricter_gate(models):
    fast = Engine(models=models, config_name="fast")
    assert "near pixels" in check_vectors(fast, off_by(0.9995))
    with pytest.raises(WrongVectors, match="the gate of fp32, on"):
        check_vectors(fast, off_by(0.9995), on_pixels=True)


def test_the_mean_of_ten_photographs_is_not_checked(models):
    """One of few photographs may be the worst of a hundred that pass."""
    assert "the vectors match open_clip's" in check_vectors(Engine(models=models, config_name="fast"), off_by(0.9965))


@pytest.mark.parametrize("bound", [4_000_000, 40_000_000, None])
def test_very_large_photographs_are_left_out_of_the_sample(tmp_path, monkeypatch, bound):
    """A server might refuse them. Pillow's own limit does not matter: it warns above it, and fails above twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)

    def png(width, height, more=0):
        buffer = BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        return buffer.getvalue() + bytes(more)

    @dataclasses.dataclass
    class Oracle:
        orientation: str = "ignore"

        def pixels(self, _image):
            return np.zeros((224, 224, 3), np.uint8)

        def embed(self, images):
            return np.full((len(images), 512), self.orientation == "exif", np.float32)

    small = [png(30, 30 + number) for number in range(11)]
    large = [png(8000, 8000), png(30, 30, 9_000_000)]
    graph = tmp_path / "model.onnx"
    write_sample(graph, WEIGHTS, large, Oracle())
    assert Sample.read(graph) is None
    write_sample(graph, WEIGHTS, [large[0], *small[:3], large[1], *small[3:]], Oracle())
    assert Sample.read(graph).files == tuple(small[:10])


def test_an_upright_configuration_is_compared_with_the_upright_vectors(models, sample):
    """They differ for a photograph that lies on its side."""
    graph, upright = models / "clip_onnx" / "1" / "model.onnx", Engine(models=models, config_name="upright")
    assert "were not verified against open_clip" in check_vectors(upright, off_by(1.0))
    turned = np.roll(sample.embeddings, 1, axis=0)
    dataclasses.replace(sample, upright_embeddings=turned).write(graph)
    assert "the vectors match open_clip's" in check_vectors(upright, lambda _: turned)
    assert "the vectors match open_clip's" in check_vectors(upright, off_by(1.0), on_pixels=True)
    with pytest.raises(WrongVectors):
        check_vectors(upright, off_by(1.0))
    with pytest.raises(WrongVectors):
        check_vectors(Engine(models=models), lambda _: turned)


def test_vectors_of_nan_are_wrong(models):
    with pytest.raises(WrongVectors, match="worst cosine -1"):
        check_vectors(Engine(models=models), lambda sample: sample.embeddings * np.nan)


def test_a_sample_of_other_weights_is_not_used(models):
    write_graph(models, weights=dataclasses.replace(WEIGHTS, pretrained="openai"))
    assert "were not verified against open_clip" in check_vectors(Engine(models=models), off_by(1.0))


def test_a_plan_is_verified_with_the_sample_of_its_graph(models):
    """The plan's manifest has the graph's sha256."""
    graph, plan = models / "clip_onnx" / "1" / "model.fp16.onnx", models / "clip_trt" / "1" / "model.plan"
    plan.write_bytes(b"plan")
    fields = {
        "sha256": sha256_of(plan),
        "onnx": graph.name,
        "onnx_sha256": sha256_of(graph),
        "precision": "fp16",
        "targets": [],
    }
    unknown = {field.name: None for field in dataclasses.fields(PlanManifest) if field.name not in fields}
    plan.with_name("manifest.json").write_text(json.dumps({**unknown, **fields}))
    engine = Engine(models=models, config_name="trt")
    with pytest.raises(WrongVectors, match=r"under 0.999, the gate of fp16"):
        check_vectors(engine, off_by(0.998))
    assert "(fp16: at least 0.999)" in check_vectors(engine, off_by(0.9995))
    graph.write_bytes(b"another")
    assert unchanged_graph_of(plan) is None
    assert f"the graph of {plan} or its manifest is missing" in check_vectors(engine, off_by(1.0))
