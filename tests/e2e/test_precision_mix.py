"""The real server runs a mix of precisions that `clip-tools tune-precision --apply` wrote."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from tests.conftest import options_for
from tests.small_graph import write_small_transformer

from clip_embed import EmbeddingClient
from clip_tools.accuracy.gates import agreement, cosines
from clip_tools.export.mix import LayeredGraph, Mix, apply
from clip_tools.export.tune_precision import embed
from clip_tools.oracle import Weights
from clip_tools.paths import MODELS
from clip_tools.serving.server import EmbeddedServer

MIX = ("fp32", "fp32", "bf16", "bf16", "fp32")


@pytest.mark.usefixtures("bf16")
def test_an_applied_mix_is_served_under_its_name(tmp_path):
    """The served vectors are those of the mix without a server, and not those of FP32."""
    import onnx

    models = tmp_path / "models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("*.onnx", "*.plan", "manifest*", "__pycache__"))
    graph = write_small_transformer(models / "clip_onnx" / "1" / "model.onnx")
    same = np.eye(2, dtype=np.float32)
    mix = Mix(MIX, 3, agreement(same, same), 1.5, 1.5, 1.5, 100.0)
    apply(mix, graph, Weights("ViT-B-32", "random:0"), "mixed", "in a test", models)
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 7, 7, 3)), np.ones((1, 32, 32, 1))).astype(np.uint8)
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    with EmbeddedServer(options_for(models, tmp_path / "log", config_name="mixed")) as server:
        with EmbeddingClient(server.options.grpc_url, timeout_s=60) as client:
            served = client.embed(files)
        assert "in 3 parts, 1 of them in BF16" in (tmp_path / "log").read_text()
    layered = LayeredGraph(onnx.load(str(graph)), tmp_path)
    bare, plain = (embed(layered.open(precisions), pixels) for precisions in (MIX, ("fp32",) * 5))
    assert np.abs(served - bare).max() < 1e-5  # the same sessions, but other batches may sum in another order
    assert cosines(served, plain).max() < 0.99999999 and np.abs(served - plain).max() > 1e-5
