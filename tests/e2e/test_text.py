"""The real server returns open_clip's embeddings of texts."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import options_for

from clip_embed import AsyncEmbeddingClient, EmbeddingClient, InvalidTextError, ModelNotReadyError, wire
from clip_tools.accuracy.texts import texts
from clip_tools.oracle import load_tokenizer
from clip_tools.serving.model_control import GrpcModelControl
from clip_tools.serving.server import EmbeddedServer
from clip_tools.serving.swap import swap
from clip_tools.serving.swap_steps import SwapOptions

MIN_COSINE = 0.99999  # as in test_embeddings


@pytest.fixture(scope="module")
def client(vit_server):
    with EmbeddingClient(vit_server.options.grpc_url) as one:
        yield one


@pytest.fixture(scope="module")
def expected(oracle, weights) -> np.ndarray:
    return oracle.embed_tokens(load_tokenizer(weights.model)(texts()[-40:]))


def assert_equal_open_clip(got: np.ndarray, expected: np.ndarray) -> None:
    assert (got.shape, got.dtype) == (expected.shape, np.float32)
    assert (got * expected).sum(axis=1).min() >= MIN_COSINE


def test_texts_alone_in_a_batch_and_over_http_are_open_clips(vit_server, client, expected):
    """The batch has short, empty and over-long texts."""
    some = texts()[-40:]
    assert_equal_open_clip(client.embed_text(some), expected)
    assert_equal_open_clip(np.concatenate([client.embed_text([text]) for text in some[-10:]]), expected[-10:])
    with EmbeddingClient(vit_server.options.http_url, batch_size=64) as over_http:
        assert_equal_open_clip(over_http.embed_text(some), expected)

    async def ask() -> np.ndarray:
        async with AsyncEmbeddingClient(vit_server.options.grpc_url) as one:
            return await one.embed_text(some)

    assert_equal_open_clip(asyncio.run(ask()), expected)
    assert client.embed_text([]).shape == (0, expected.shape[1])


def test_the_command_embeds_texts_of_options_and_of_stdin(vit_server, client, tmp_path):
    command = [str(Path(sys.executable).with_name("clip-embed")), f"--url={vit_server.options.grpc_url}"]
    made = tmp_path / "texts.npy"
    done = subprocess.run(
        [*command, "--text", "a dog", "--text=-"], check=False, input="eine Katze\n犬\n", capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a dog", "eine Katze", "犬"]
    assert np.allclose([row["embedding"] for row in rows], client.embed_text(["a dog", "eine Katze", "犬"]), atol=1e-6)
    subprocess.run([*command, "--text", "a dog", "--output", str(made)], check=True)
    assert np.load(made).shape == (1, 512)
    for arguments, words in ((["--text", "x", "photo.jpg"], "not both"), ([], "expected images, or texts")):
        done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr
    bad = subprocess.run([*command, "--text=-"], check=False, input=b"a dog\ncaf\xe9\n", capture_output=True)
    assert (bad.returncode, bad.stdout) == (1, b"")
    assert b"[1] not_text" in bad.stderr


def test_a_client_embeds_both_and_the_start_verified_both(vit_server, client, demo_photos):
    assert client.embed(demo_photos[:1]).shape == (1, 512)
    assert re.fullmatch(
        r".* photographs .*; for texts, the vectors match open_clip's: .* texts .*", vit_server.check_result
    )


def test_a_swap_reloads_the_text_tower_if_its_configuration_changes(light_text_repository, tmp_path):
    options, said = options_for(light_text_repository, tmp_path / "log"), []
    with (
        EmbeddedServer(options),
        EmbeddingClient(options.grpc_url) as client,
        GrpcModelControl(options.grpc_url) as control,
    ):
        before = client.embed_text(["a dog"])
        for name in ("onnx", "cpu-fp32", "onnx"):
            swap(control, SwapOptions(name, options.models, check_vectors=True, settle_s=0.1), said.append)
        assert np.array_equal(client.embed_text(["a dog"]), before)
    assert said[0] == "the server runs onnx already"
    (held,) = {line.split(": ", 1)[1].split(" (")[0] for line in said if "clip_text_ensemble verified" in line}
    assert held.startswith("the vectors match open_clip's")
    assert sum("clip_text_onnx loaded again" in line for line in said) == 2
    assert not any("tokenize" in line for line in said)


def test_one_bad_text_is_one_failed_request_with_its_index_and_code(client):
    with pytest.raises(InvalidTextError) as caught:
        client.embed_text(["a dog", "a" * 65537, "a cat"])
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [(1, "too_large")]
    no_utf8 = client._text_client()._dispatch([b"a dog", b"caf\xe9", b"\xff" * 9], keep_going=True)
    dog, *bad = client._results(no_utf8)
    assert np.linalg.norm(dog) == pytest.approx(1, abs=1e-5)
    assert [error.failures[0].code for error in bad] == ["not_text"] * 2
    with pytest.raises(InvalidTextError, match="not_text"):
        client.embed_text(["a dog", "\ud800"])
    with pytest.raises(TypeError, match="one str"):
        client.embed_text("a dog")


def test_a_server_without_a_text_tower_refuses_texts_with_the_reason(server):
    assert "tokenize" not in server.options.log.read_text()
    with (
        EmbeddingClient(server.options.grpc_url, timeout_s=1) as client,
        pytest.raises(ModelNotReadyError) as caught,
    ):
        client.embed_text(["a dog"])
    assert "export-onnx --text" in str(caught.value)
    with EmbeddingClient(server.options.grpc_url, model=wire.TEXT_MODEL) as client:
        assert not client.is_ready()
