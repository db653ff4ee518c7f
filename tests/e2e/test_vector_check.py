"""`serve` compares its vectors with open_clip's before it is ready, and a swap does so with the new engine's."""

import dataclasses
import os
import subprocess

import numpy as np
import pytest
from tests.conftest import options_for, with_second_model
from tests.e2e.test_lifecycle import serve_command, wait_for

from clip_embed import EmbeddingClient
from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError
from clip_tools.export.manifest import Manifest, manifest_path
from clip_tools.serving.model_control import GrpcModelControl
from clip_tools.serving.server import EmbeddedServer
from clip_tools.serving.swap import swap
from clip_tools.serving.swap_steps import SwapOptions

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'clip-embed[export]'")


@pytest.fixture(scope="module")
def models(light_repository, tmp_path_factory):
    """`wrong` routes to a graph with its positions in another order. Its manifest matches the file."""
    folder = with_second_model(light_repository, tmp_path_factory.mktemp("proof") / "models", "wrong")
    path = folder / "clip_wrong" / "1" / "model.onnx"
    manifest, graph = Manifest.read(path), onnx.load(str(path))
    tensor = next(one for one in graph.graph.initializer if one.name == "position")
    wrong = np.roll(onnx.numpy_helper.to_array(tensor), 7, axis=0)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    for built in (path, manifest_path(path)):
        built.unlink()  # links to files that the session shares
    onnx.save(graph, str(path))
    manifest_path(path).write_text(dataclasses.replace(manifest, sha256=sha256_of(path)).to_json())
    return folder


def test_serve_prints_the_worst_cosine_to_open_clip(light_repository, tmp_path):
    with subprocess.Popen(
        serve_command(options_for(light_repository, tmp_path / "log")), stderr=subprocess.PIPE, text=True
    ) as process:
        line = wait_for(process.stderr, "open_clip's")
        process.terminate()
        process.stderr.read()
    assert "the vectors match open_clip's: worst cosine 0.99999" in line or "worst cosine 1.00000" in line
    assert "on 10 photographs (fp32: at least 0.99999)" in line


def test_vectors_that_are_not_open_clips_are_not_served(models, tmp_path):
    """Triton calls that model ready, and it embeds. CLIP_CHECK_VECTORS=0 serves it all the same."""
    command = serve_command(options_for(models, tmp_path / "log"), "--model-config-name=wrong")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "the vectors of clip_ensemble, configuration wrong do not match open_clip's: worst cosine " in last
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"CLIP_CHECK_VECTORS": "0"}
    ) as process:
        wait_for(process.stderr, "ready after")
        process.terminate()
        process.stderr.read()
        assert process.wait(timeout=60) == 0


def test_a_swap_to_wrong_vectors_is_refused(models, demo_photos, tmp_path):
    """The engine is checked before the ensemble uses it, so no client gets a wrong vector."""
    said, served = [], options_for(models, tmp_path / "log")
    image = demo_photos[0].read_bytes()
    with EmbeddedServer(served), EmbeddingClient(served.grpc_url) as client:
        before = client.embed([image])
        with GrpcModelControl(served.grpc_url) as control:
            options = SwapOptions("wrong", models=models, allow_other_weights=True, check_vectors=True)
            with pytest.raises(ToolError, match=r"\(clip_wrong verified .*\): the vectors .*; everything is as"):
                swap(control, options, said.append)
            assert "clip_wrong" not in control.ready_models()
        assert np.array_equal(client.embed([image]), before)
    assert not [line for line in said if "clip_ensemble goes through" in line]
