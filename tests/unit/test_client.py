"""The blocking client against real sockets."""

import array
import ast
import graphlib
import io
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_client_loopback import Brain, serve, vector_of

import clip_embed
from clip_embed import (
    ContractError,
    DeadlineExceededError,
    EmbeddingClient,
    EmbeddingError,
    InvalidImageError,
    ModelNotReadyError,
    ServerError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from clip_embed.provenance import Provenance
from clip_embed.server_info import ServerInfo


@pytest.fixture(scope="module")
def brain():
    return Brain()


@pytest.fixture(scope="module", params=["grpc", "http"])
def url(request, brain):
    if request.param == "http":
        pytest.importorskip("httpx", reason="pip install 'clip-embed[http]'")
    with serve(request.param, brain) as url:
        yield url


@pytest.fixture(autouse=True)
def _fresh(brain):
    brain.reset()
    yield
    brain.gate.set()


@pytest.fixture
def client(url):
    with EmbeddingClient(url) as client:
        yield client


def images_of(count: int) -> list[bytes]:
    return [b"image %d" % i * (i % 7) for i in range(count)]


def test_embeddings_are_rows_in_the_order_of_the_images(client, brain):
    """20 images are sent in requests of 8, 8 and 4, and the rows are exactly the server's floats."""
    images = images_of(20)
    embeddings = client.embed(images)
    assert embeddings.dtype == np.float32
    assert embeddings.flags.c_contiguous
    assert np.array_equal(embeddings, np.stack([vector_of(image) for image in images]))
    assert sorted(brain.requests) == [4, 8, 8]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 40), batch_size=st.integers(1, 9), max_in_flight=st.integers(1, 5), limit=st.integers(1, 99)
)
def test_order_holds_for_any_batching(url, count, batch_size, max_in_flight, limit):
    """However a call is cut into requests, row i is image i."""
    options = {"batch_size": batch_size, "max_in_flight": max_in_flight, "max_batch_bytes": limit}
    with EmbeddingClient(url, **options) as client:
        images = images_of(count)
        expected = np.stack([vector_of(image) for image in images]) if images else np.empty((0, 512))
        assert np.array_equal(client.embed(images), expected)


def test_a_proxy_in_the_environment_is_not_used_for_localhost(url, monkeypatch):
    """For a proxy on another machine, localhost is that machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with EmbeddingClient(url, retry=None) as client:
        assert client.embed([b"a"]).shape == (1, 512)


def test_no_images_give_no_rows_and_no_request(client, brain):
    assert client.embed([]).shape == (0, 512)
    assert client.embed([]).dtype == np.float32
    assert brain.requests == []


def test_bytes_like_objects_and_paths_give_the_same_vector(client, tmp_path):
    content = b"an encoded file."
    (tmp_path / "image.jpg").write_bytes(content)
    forms = [
        content,
        bytearray(content),
        memoryview(b"xx" + content)[2:],
        memoryview(array.array("I", content)),
        memoryview(bytes(byte for byte in content for _ in range(2)))[::2],
        tmp_path / "image.jpg",
        str(tmp_path / "image.jpg"),
    ]
    assert np.array_equal(client.embed(forms), np.stack([vector_of(content)] * len(forms)))


def test_embeddings_can_be_written_to(client):
    client.embed([b"a"])[:] *= 2
    next(client.embed_many([b"a"]))[:] *= 2


@pytest.mark.parametrize(
    "one",
    [
        *("photo.jpg", b"bytes", bytearray(b"bytes"), memoryview(b"bytes")),
        *(io.BytesIO(b"lines\nof a file"), np.zeros((4, 4, 3), np.uint8)),
    ],
)
def test_one_image_in_place_of_many_is_refused(client, one, brain):
    """A str iterates over letters, a file over lines. Without the check each letter would be a path."""
    for call in (client.embed, client.embed_many):
        with pytest.raises(TypeError, match=r"give \[image\]"):
            call(one)
    assert brain.requests == []


def test_pixels_are_sent_as_png_without_loss(client, brain):
    """Arrays and views, and Pillow's images in their own mode: palette, alpha, one bit."""
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    smooth = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 3, 3))
    arrays = [noise, smooth, noise[::-1, ::2], noise[:1, :1]]
    palette = Image.fromarray(noise).quantize(7)
    palette.info["transparency"] = 3
    images = [palette, Image.fromarray(noise).convert("LA"), Image.new("1", (9, 2), 1), Image.fromarray(noise)]
    client.embed([*arrays, *images])
    sent = [Image.open(io.BytesIO(one)) for one in brain.embedded]
    for array_, one in zip(arrays, sent, strict=False):
        assert np.array_equal(np.asarray(one), array_)
    for image, one in zip(images, sent[len(arrays) :], strict=True):
        assert one.mode == image.mode
        assert np.array_equal(np.asarray(one.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_open_files_are_read_from_their_current_position(client, brain, tmp_path):
    """Even if `read` returns less than the whole file. A file in text mode or a closed one is unreadable."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"skipped, then the image")
    with path.open("rb") as file, path.open() as text, path.open("rb", buffering=0) as raw:
        file.seek(len(b"skipped, "))
        client.embed([file, io.BytesIO(b"in memory"), raw])
        assert sorted(brain.embedded) == [b"in memory", b"skipped, then the image", b"then the image"]
        first, second = client.embed_many([text, file_that_is_closed(path)])
    assert (first.failures[0].source, first.failures[0].code) == (str(path), "unreadable")
    assert "mode 'rb'" in first.failures[0].reason
    assert "closed" in second.failures[0].reason


def file_that_is_closed(path):
    with path.open("rb") as file:
        return file


def test_arrays_and_pillow_modes_that_are_not_supported_are_refused(client, brain):
    """Floats, gray, four channels, other objects, and a mode of Pillow that PNG does not have."""
    for wrong in (np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8), object()):
        with pytest.raises(TypeError, match=r"images\[1\]: expected .*\(H, W, 3\) uint8 array"):
            client.embed([b"a", wrong])
    with pytest.raises(InvalidImageError, match=r"mode CMYK.*convert\('RGB'\)"):
        client.embed([Image.new("CMYK", (2, 2))])
    assert brain.embedded == []


def test_served_reads_the_models_parameters_and_is_empty_when_access_is_restricted(client, brain):
    assert client.served() == ServerInfo()
    brain.parameters = {"clip_model": "ViT-B-32", "clip_checkpoint": "a" * 64, "clip_preprocess": "exact", "other": "1"}
    assert client.served() == ServerInfo(Provenance("ViT-B-32", "a" * 64, "exact"))
    brain.parameters = {"clip_suffixes": ".jpg .heic"}
    assert client.served() == ServerInfo(suffixes=frozenset({".jpg", ".heic"}))


def test_servers_of_different_weights_are_refused_in_one_client(url, brain):
    other = Brain()
    other.parameters = {"clip_model": "ViT-B-16", "clip_checkpoint": "tag", "clip_preprocess": "exact"}
    with serve("grpc", other) as second, EmbeddingClient(urls=[url, second]) as client:
        with pytest.raises(ContractError, match=r"same weights, got .*does not say; .*ViT-B-16, tag"):
            client.served()
        brain.parameters = other.parameters
        assert client.served().provenance.model == "ViT-B-16"


def test_bad_images_are_named_by_the_callers_index_and_path(url, tmp_path):
    """The server's index counts within a request, the caller's within the call."""
    path = tmp_path / "cut.jpg"
    path.write_bytes(b"bad:truncated:the file ends early")
    with EmbeddingClient(url, batch_size=4, max_in_flight=1) as client, pytest.raises(InvalidImageError) as caught:
        client.embed([*images_of(5), b"bad:empty:0 bytes", path, b"good"])
    assert [(f.index, f.code, f.reason, f.source) for f in caught.value.failures] == [
        (5, "empty", "0 bytes", None),
        (6, "truncated", "the file ends early", str(path)),
    ]
    assert f"[6] {path}: truncated: the file ends early" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jpg", "folder", "fifo.jpg", "socket.jpg", "endless.jpg", "loop.jpg", "a\0b"])
def test_an_unreadable_file_is_named(client, tmp_path, name):
    """FIFOs, sockets and devices too: the client neither waits for them nor reads them without end."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
        with pytest.raises(InvalidImageError) as caught:
            client.embed([b"good", tmp_path / name])
    (failure,) = caught.value.failures
    assert (failure.index, failure.code, failure.source) == (1, "unreadable", str(tmp_path / name))
    assert str(caught.value).isprintable()
    assert client.embed([Path("/proc/self/status")]).shape == (1, 512)  # a file, although its size is 0 bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_client_that_was_used_before_a_fork_works_in_the_child_and_in_the_parent(client):
    """joblib and a DataLoader's workers fork. The end of a child does not close the parent's connection."""
    for number in range(3):
        client.embed([b"%d in the parent" % number])
        child = os.fork()
        if not child:
            try:
                with client:
                    got = client.embed([b"in the child"])
                os._exit(0 if np.array_equal(got, [vector_of(b"in the child")]) else 1)
            finally:
                os._exit(2)
        ends_s = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < ends_s:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
    assert client.is_ready()


def test_a_client_cannot_be_pickled(client):
    """A DataLoader that spawns its workers would pickle it."""
    with pytest.raises(TypeError, match="create one in each process"):
        pickle.dumps(client)


def test_a_bad_image_does_not_affect_its_neighbours(url, brain, tmp_path):
    """embed_many gives each bad image its own error, and every other image its vector, in order."""
    images = images_of(30)
    bad = {3: "empty", 4: "corrupt", 17: "corrupt", 29: "truncated"}
    for index, code in bad.items():
        images[index] = f"bad:{code}:a; [reason] {index}".encode()
    images[10] = tmp_path / "missing.jpg"
    with EmbeddingClient(url, batch_size=8) as client:
        results = list(client.embed_many(iter(images)))
    assert len(results) == 30
    for index, (image, result) in enumerate(zip(images, results, strict=True)):
        if index in bad or index == 10:
            (failure,) = result.failures
            assert (failure.index, failure.code) == (index, bad.get(index, "unreadable"))
        else:
            assert np.array_equal(result, vector_of(image))


def test_a_whole_request_of_bad_images_is_not_sent_again(client, brain):
    results = list(client.embed_many([b"bad:empty:0 bytes"] * 8))
    assert [result.failures[0].index for result in results] == list(range(8))
    assert brain.requests == [8]


def test_a_failed_request_of_embed_many_spares_the_others(url):
    """Each image of the failed request gets its error; the other images get their vectors."""
    with EmbeddingClient(url, batch_size=2) as client:
        results = list(client.embed_many([b"a", b"b", b"fail:INTERNAL:boom", b"c", b"d"]))
    assert [isinstance(result, ServerError) for result in results] == [False, False, True, True, False]
    assert np.array_equal(results[4], vector_of(b"d"))


def test_images_are_read_as_they_are_needed(url):
    """From an endless stream, taking ten results reads a bounded number of images."""
    taken = 0

    def endless():
        nonlocal taken
        for taken in itertools.count(1):
            yield b"image %d" % taken

    with EmbeddingClient(url, batch_size=2, max_in_flight=2) as client:
        results = list(itertools.islice(client.embed_many(endless()), 10))
    assert np.array_equal(results[9], vector_of(b"image 10"))
    assert taken <= 10 + 4 * 2 * 2 + 2


def test_a_slow_request_does_not_block_the_others(url, brain):
    """While the first request waits, later ones are answered; their results still come after it."""
    with EmbeddingClient(url, batch_size=1, max_in_flight=2) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [b"wait", b"b", b"c", b"d"])
        assert all(brain.arrived.acquire(timeout=10) for _ in range(4))
        assert not call.done()
        brain.gate.set()
        assert np.array_equal(call.result(10), np.stack([vector_of(image) for image in (b"wait", b"b", b"c", b"d")]))


def test_requests_in_flight_are_bounded(url, brain):
    """Two may wait at the server; the third is not sent before one comes back."""
    with EmbeddingClient(url, batch_size=1, max_in_flight=2) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [b"wait"] * 5)
        assert brain.waiting.acquire(timeout=10)
        assert brain.waiting.acquire(timeout=10)
        assert not brain.waiting.acquire(timeout=0.1)
        brain.gate.set()
        assert call.result(10).shape == (5, 512)


def test_the_deadline_covers_the_whole_call(url):
    with EmbeddingClient(url, timeout_s=0.2) as client, pytest.raises(DeadlineExceededError):
        client.embed([b"wait"])


def test_no_deadline_is_allowed(url):
    with EmbeddingClient(url, timeout_s=None) as client:
        assert client.embed([b"a"]).shape == (1, 512)


def test_one_failure_cancels_the_rest(url, brain):
    """The call's other requests are cancelled: gRPC tells the server, HTTP drops the connection."""
    with EmbeddingClient(url, batch_size=1, max_in_flight=2) as client:
        with pytest.raises(ServerError, match="boom"):
            client.embed([b"wait", b"fail:INTERNAL:boom", b"never sent"])
        assert len(brain.requests) <= 2
        if url.startswith("grpc"):
            assert brain.cancelled.acquire(timeout=10)


def test_threads_share_a_client(client):
    """Each of 8 threads gets its own images' vectors."""
    with ThreadPoolExecutor(8) as pool:
        calls = {i: pool.submit(client.embed, [b"%d of %d" % (k, i) for k in range(11)]) for i in range(8)}
    for i, call in calls.items():
        assert np.array_equal(call.result(), np.stack([vector_of(b"%d of %d" % (k, i)) for k in range(11)]))


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        ("UNAVAILABLE", "in ensemble 'clip_ensemble', Exceeds maximum queue size", ServerOverloadedError),
        ("NOT_FOUND", "Request for unknown model: 'clip_ensemble' has no available versions", ModelNotReadyError),
        ("INTERNAL", "boom", ServerError),
    ],
)
def test_a_failed_request_raises_the_matching_error_with_the_servers_message(url, status, message, expected):
    with EmbeddingClient(url, retry=None) as client, pytest.raises(expected) as caught:
        client.embed([f"fail:{status}:{message}".encode()])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "alter",
    [
        lambda rows: rows[:, :256],
        lambda rows: rows[:-1],
        lambda rows: rows.astype(np.float16),
        lambda rows: rows * 2,
        lambda rows: rows * np.nan,
    ],
    ids=["256 numbers", "a row missing", "FP16", "norm 2", "NaN"],
)
def test_another_models_answer_is_refused(client, brain, alter):
    """Only (n, 512) FP32 rows of norm 1 are accepted."""
    brain.alter = alter
    with pytest.raises(ContractError, match=r"expected .* got"):
        client.embed([b"a", b"b"])


def test_readiness_follows_the_model(url, brain):
    with EmbeddingClient(url) as client, EmbeddingClient(url, model="other") as other:
        assert client.is_ready()
        assert not other.is_ready()
        brain.ready = False
        assert not client.is_ready()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_does_not_run_is_not_ready_and_a_call_says_what_to_do(scheme):
    """`is_ready` returns False; a call raises an error with the URL and what to do."""
    with serve(scheme, Brain()) as url:
        pass
    with EmbeddingClient(url, retry=None) as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailableError, match=f"{url}.*start the server") as caught:
            client.embed([b"a"])
    assert caught.value.retryable
    assert caught.value.__cause__ is not None


def test_a_client_may_be_closed_during_a_call(url, brain):
    """The call ends at once, with an error that says why."""
    client = EmbeddingClient(url)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [b"wait"])
        assert brain.waiting.acquire(timeout=10)
        client.close()
        with pytest.raises(ServerUnavailableError):
            call.result(10)
    client.close()
    assert not client.is_ready()
    with pytest.raises(RuntimeError, match="closed"):
        client.embed([b"a"])


def test_the_transport_can_be_replaced():
    """So that the tests of an application need no server."""

    class Constant:
        def send(self, images, timeout_s):
            answer = Future()
            answer.set_result(np.full((len(images), 512), 512**-0.5, np.float32))
            return answer

        def is_ready(self, timeout_s):
            answer = Future()
            answer.set_result(True)
            return answer

        def close(self):
            pass

    with EmbeddingClient(transport=Constant()) as client:
        assert client.is_ready()
        assert client.embed([b"a"] * 9).shape == (9, 512)


@pytest.mark.parametrize(
    "bad",
    [
        "ftp://host:1",
        "grpc://host",
        "grpc://",
        "http://",
        "host",
        "host:port",
        "grpc://host:1/path",
        "",
        "http://h/?q=1",
    ],
)
def test_malformed_urls_are_refused(bad, monkeypatch):
    with pytest.raises(ValueError):
        EmbeddingClient(bad)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", bad)
    with pytest.raises(ValueError, match="INFERENCE_SERVICE_URL"):
        EmbeddingClient.from_env()


def test_the_server_may_come_from_the_environment(url, monkeypatch):
    monkeypatch.delenv("INFERENCE_SERVICE_URL", raising=False)
    with pytest.raises(ValueError, match="INFERENCE_SERVICE_URL is not set"):
        EmbeddingClient.from_env()
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url.removeprefix("grpc://"))  # a bare host:port means gRPC
    with EmbeddingClient.from_env(batch_size=2) as client:
        assert client.embed([b"a"]).shape == (1, 512)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_in_flight": 0}, {"max_batch_bytes": 0}, {"timeout_s": 0}])
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        EmbeddingClient(**options)


def test_http_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'clip-embed\[http\]'"):
        EmbeddingClient("http://localhost:8000")


def test_the_import_needs_no_extra():
    """With gRPC the client needs only numpy and tritonclient."""
    code = "import clip_embed, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"httpx", "typer", "rich", "pyarrow", "gevent", "PIL", "torch", "clip_tools"} & set(modules)


def test_the_modules_have_no_import_cycle():
    """Imports inside functions count too."""
    folder = Path(clip_embed.__file__).parent
    imports = {
        f"clip_embed.{path.stem}": {
            node.module
            if node.module != "clip_embed" or not (folder / f"{name.name}.py").exists()
            else f"clip_embed.{name.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "clip_embed"
            for name in node.names
        }
        for path in folder.glob("*.py")
    }
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) >= len(imports) > 10


def test_every_error_is_an_embedding_error_and_says_whether_to_retry():
    errors = [value for name, value in vars(clip_embed).items() if name.endswith("Error")]
    assert len(errors) == 12
    assert all(issubclass(error, EmbeddingError) for error in errors)
    assert {error.__name__ for error in errors if error.retryable} == {
        "ServerUnavailableError",
        "ServerOverloadedError",
        "ModelNotReadyError",
        "DeadlineExceededError",
    }


def test_a_closed_client_leaves_no_threads(url):
    before = set(threading.enumerate())
    with EmbeddingClient(url) as client:
        client.embed([b"a"])
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not any(name.startswith("clip-embed") for name in left)
