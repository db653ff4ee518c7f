"""The PyTorch service of `bench` runs open_clip in the precision that was asked for."""

import base64

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'clip-embed[baseline]'")

from clip_tools import oracle as oracle_module
from clip_tools.accuracy import reference as reference_module
from clip_tools.errors import ToolError
from clip_tools.measuring.baseline import service as service_module


def test_fp16_is_fp16_and_the_service_names_its_device(oracle, weights, demo_photos):
    """The vectors are close to FP32's but not equal: with weights left in FP32 the difference would be 0."""
    import torch
    from starlette.testclient import TestClient

    images = [path.read_bytes() for path in demo_photos[:2]]
    with TestClient(service_module.create_app(weights, "fp16")) as client:
        device = "GPU" if torch.cuda.is_available() else "CPU"
        assert client.get("/health").json() == {"status": "ready", "device": device, "precision": "fp16"}
        body = {"images": [base64.b64encode(image).decode() for image in images]}
        answer = np.array(client.post("/embed/base64", json=body).json()["embeddings"], np.float32)
        form = client.post(
            "/embed/batch", files=[("files", (path.name, path.read_bytes())) for path in demo_photos[:2]]
        )
        assert np.array_equal(np.array(form.json()["embeddings"], np.float32), answer)
        assert form.json()["count"] == 2
        info = client.get("/model-info").json()
        assert info == form.json()["model_info"]
        assert info["model_name"] == weights.model and info["precision"] == "fp16" and info["embedding_dim"] == 512
        assert client.post("/embed/base64", json={"images": []}).status_code == 400
    expected = oracle.embed(images)
    assert (answer * expected).sum(axis=1).min() > 0.99
    assert np.abs(answer - expected).max() > 1e-5


def test_where_there_is_a_gpu_open_clip_runs_on_it(weights, demo_photos, tmp_path, monkeypatch):
    """Both the service and the reference of gates and measurements."""
    import torch

    devices = []

    def load(_weights, *, device, **_):
        devices.append(device)
        raise ToolError("no GPU here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (oracle_module, reference_module, service_module):
        monkeypatch.setattr(module, "load_oracle", load)
    for call in (
        lambda: service_module.create_app(weights),
        lambda: reference_module.reference(weights, demo_photos[:1], folder=tmp_path),
    ):
        with pytest.raises(ToolError, match="no GPU here"):
            call()
    assert devices == ["cuda"] * 2


def test_open_clip_in_fp32_is_fp32_on_a_gpu_too(oracle):
    """cuDNN computes convolutions in TF32 by default."""
    import torch

    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
