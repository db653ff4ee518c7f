"""The embedded server runs a TensorRT plan. This needs a GPU."""

import shutil

import pytest
from tests.conftest import options_for

from clip_embed import EmbeddingClient
from clip_tools.accuracy.gates import GATES
from clip_tools.gpu import find_gpu
from clip_tools.serving.server import EmbeddedServer
from clip_tools.tensorrt.build_engine import PlanOptions, build_engine
from clip_tools.tensorrt.runtime import RUNTIMES, installed_version

MIN_COSINE = GATES["fp32"].worst_cosine  # TF32, with FP16's mantissa, would not reach it


RUNTIME = next((name for name in RUNTIMES if installed_version(name)), None)


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="needs an NVIDIA GPU")
@pytest.mark.skipif(RUNTIME is None, reason="needs TensorRT: make setup-trt, or [rtx] on an RTX GPU")
def test_a_plan_gives_the_vectors_of_the_onnx_model(repository, onnx_model, server, demo_photos, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(repository, models, symlinks=True)
    build_engine(onnx_model, models / "clip_trt" / "1" / "model.plan", PlanOptions(RUNTIME, precision="fp32"))
    images = [path.read_bytes() for path in demo_photos]
    with EmbeddingClient(server.options.grpc_url) as client:
        expected = client.embed(images)
    options = options_for(models, tmp_path / "log", config_name="trt", ready_timeout_s=300.0)
    with EmbeddedServer(options), EmbeddingClient(options.grpc_url) as client:
        together = client.embed(images)
        alone = client.embed(images[:1])
    assert (together * expected).sum(axis=1).min() >= MIN_COSINE
    assert (alone * expected[:1]).sum(axis=1).min() >= MIN_COSINE
    assert f"runs model.plan with {RUNTIME.replace('-', '_')}" in options.log.read_text()
