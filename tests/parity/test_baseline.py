"""The PyTorch service that `bench` compares with is open_clip, in the precision that it was asked for."""

import base64

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'clip-embed[baseline]'")

from clip_tools.measuring.baseline.service import create_app


def test_fp16_is_fp16_and_the_service_says_on_what(oracle, weights, demo_photos):
    """Next to open_clip in FP32, but not it: with weights that stayed FP32 the difference were 0."""
    import torch
    from starlette.testclient import TestClient

    images = [path.read_bytes() for path in demo_photos[:2]]
    with TestClient(create_app(weights, "fp16")) as client:
        device = "GPU" if torch.cuda.is_available() else "CPU"
        assert client.get("/health").json() == {"status": "ready", "device": device, "precision": "fp16"}
        body = {"images": [base64.b64encode(image).decode() for image in images]}
        answer = np.array(client.post("/embed/base64", json=body).json()["embeddings"], np.float32)
    expected = oracle.embed(images)
    assert (answer * expected).sum(axis=1).min() > 0.99
    assert np.abs(answer - expected).max() > 1e-5


def test_open_clip_in_fp32_is_fp32_on_a_gpu_too(oracle):
    """cuDNN's convolutions are TF32 unless it is told otherwise."""
    import torch

    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
