"""Models other than ViT-B-32 are served with their own image size, transform and embedding dimension."""

import shutil

import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.conftest import (
    exported,
    exported_text,
    kept_model,
    options_for,
    oracle_of,
    with_image,
    with_text,
)

from clip_embed import EmbeddingClient
from clip_tools import oracle as oracle_module
from clip_tools.accuracy.texts import texts
from clip_tools.oracle import OtherTokenizer, Weights, load_tokenizer
from clip_tools.serving.server import EmbeddedServer

MIN_COSINE = 0.99999  # as in test_embeddings
TINY = "tiny-resnet"  # 96 dimensions, 160 px, a convolutional tower, traced
LONG = [
    "RN50",  # 1024 dimensions, a convolutional tower
    "MobileCLIP2-S0",  # 256 px, bilinear, two towers traced
    "ViT-B-16-SigLIP2",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14-378-quickgelu",  # 2.5 GB of weights in a second file; 8 s for an image
]
BILINEAR = {"image_mean": (0, 0, 0), "image_std": (1, 1, 1), "image_interpolation": "bilinear"}  # MobileCLIP's


def test_seeded_weights_use_the_transform_of_the_pretrained_ones():
    """open_clip itself would use the transform of OpenAI's weights."""
    assert oracle_module._transform_of_a_tag("MobileCLIP2-S0").items() >= BILINEAR.items()
    assert oracle_module._transform_of_a_tag(TINY) == {}


@pytest.mark.parametrize("name", [TINY, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_a_model_gives_open_clips_pixels_and_vectors(name, demo_photos, odd_images, tmp_path, monkeypatch):
    if name == TINY:
        monkeypatch.setattr(oracle_module, "_transform_of_a_tag", lambda _: BILINEAR)
    weights = Weights(name, "random:0")
    photographs = demo_photos[:2] if name == LONG[-1] else demo_photos
    oracle, images = oracle_of(weights), [path.read_bytes() for path in photographs]
    odd = [(odd_images / file).read_bytes() for file in ("pil_sample_cmyk.jpg", "transparent.png", "hopper.gif")]
    models = with_image(tmp_path / "image", exported(weights, photographs))
    some = texts()[-12:]
    try:
        expected_texts = oracle.embed_tokens(load_tokenizer(name)(some))
        models = with_text(models, tmp_path / "models", exported_text(weights))
    except OtherTokenizer:
        expected_texts = None
    options = options_for(models, tmp_path / "log", check_vectors=True, ready_timeout_s=900)
    with EmbeddedServer(options) as server, EmbeddingClient(options.grpc_url, timeout_s=300) as client:
        assert "the vectors match open_clip's" in server.check_result
        for image in (*images[:4], *odd):
            assert np.array_equal(pixels_of(options.grpc_url, image), oracle.pixels(image))
        got, expected = client.embed(images), oracle.embed(images)
        assert got.shape == expected.shape
        assert (got * expected).sum(axis=1).min() >= MIN_COSINE
        if expected_texts is not None:
            got = client.embed_text(some)
            assert got.shape == expected_texts.shape == (12, expected.shape[1])
            assert (got * expected_texts).sum(axis=1).min() >= MIN_COSINE
    if name != TINY:  # it has gigabytes
        shutil.rmtree(kept_model(weights, ""))


def pixels_of(url: str, image: bytes) -> np.ndarray:
    tensor = triton.InferInput("image_bytes", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[image]], dtype=object))
    with triton.InferenceServerClient(url.removeprefix("grpc://")) as client:
        return client.infer("preprocess", [tensor]).as_numpy("pixels")[0]
