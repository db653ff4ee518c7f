"""INFERENCE_BACKEND=pytorch: the same client against the PyTorch service's JSON, on a real loopback socket."""

import asyncio
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from test_client_loopback import vector_of

from clip_embed import AsyncEmbeddingClient, ContractError, EmbeddingClient, InvalidImageError, base64_images

pytest.importorskip("httpx", reason="pip install 'clip-embed[http]'")


class Service(BaseHTTPRequestHandler):
    """Answers as the baseline service does. It refuses an image `bad`; `odd` gets rows of another shape."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        images = [base64.b64decode(image, validate=True) for image in json.loads(body)["images"]]
        if self.path != "/embed/base64":
            self.reply(404, {"error": "no such path"})
        elif b"bad" in images:
            at = images.index(b"bad")
            self.reply(400, {"error": f"image_bytes: 1 of {len(images)} images refused. [{at}] not_an_image: no"})
        elif b"odd" in images:
            self.reply(200, {"embeddings": [[1.0, 2.0]]})
        else:
            self.reply(200, {"embeddings": [vector_of(image).tolist() for image in images]})

    def reply(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self._headers_buffer.append(b"\r\n" + body)  # one write: two would wait for a delayed ACK
        self.flush_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def environment(url, monkeypatch):
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    monkeypatch.setenv("INFERENCE_BACKEND", "pytorch")


def test_inference_backend_switches_a_client_to_the_pytorch_service(environment):
    """The same call, the same rows in the same order, in requests of 8, 8 and 4."""
    images = [b"image %d" % i for i in range(20)]
    with EmbeddingClient.from_env() as client:
        assert client.is_ready()
        assert np.array_equal(client.embed(images), np.stack([vector_of(image) for image in images]))


def test_the_async_client_switches_too(environment):
    async def embed():
        async with AsyncEmbeddingClient.from_env() as client:
            return await client.embed([b"one", b"two"])

    assert np.array_equal(asyncio.run(embed()), np.stack([vector_of(b"one"), vector_of(b"two")]))


def test_a_bad_image_is_named(environment):
    with EmbeddingClient.from_env() as client, pytest.raises(InvalidImageError) as caught:
        client.embed([b"one", b"bad", b"two"])
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [(1, "not_an_image")]


def test_embed_base64_images_takes_base64_and_returns_lists(environment):
    """Line ends and data URLs are allowed. Invalid base64 is an error with its index, and nothing is sent."""
    one, two = (base64.encodebytes(image).decode() for image in (b"one" * 40, b"two"))
    with base64_images.EmbeddingClient.from_env() as client:
        assert isinstance(client, EmbeddingClient)
        vectors = client.embed_base64_images([one, f"data:image/jpeg;base64,{two}"])
        assert vectors == [vector_of(b"one" * 40).tolist(), vector_of(b"two").tolist()]
        with pytest.raises(InvalidImageError) as caught:
            client.embed_base64_images([one, "no base64!"])
        with pytest.raises(TypeError, match="one text"):
            client.embed_base64_images(one)
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [(1, "not_base64")]


def test_an_answer_of_another_shape_is_refused(environment):
    with EmbeddingClient.from_env() as client, pytest.raises(ContractError, match=r"expected \(1, D\)"):
        client.embed([b"odd"])


def test_the_default_backend_is_triton(url, monkeypatch):
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    monkeypatch.delenv("INFERENCE_BACKEND", raising=False)
    with EmbeddingClient.from_env() as client:
        assert not client.is_ready()  # it asks for Triton's path, which this service does not have


@pytest.mark.parametrize(
    ("service", "backend", "message"),
    [("grpc://localhost:8001", "pytorch", "speaks only HTTP"), ("http://localhost", "tensorflow", "expected one of")],
)
def test_the_error_for_an_unusable_backend_names_the_variable(monkeypatch, service, backend, message):
    monkeypatch.setenv("INFERENCE_SERVICE_URL", service)
    monkeypatch.setenv("INFERENCE_BACKEND", backend)
    with pytest.raises(ValueError, match=f"INFERENCE_BACKEND: .*{message}"):
        EmbeddingClient.from_env()
