"""The asyncio client against real sockets. test_client.py tests what it shares with the blocking client."""

import asyncio
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from test_client_loopback import Brain, serve, vector_of

from clip_embed import (
    AsyncEmbeddingClient,
    DeadlineExceededError,
    InvalidImageError,
    ServerError,
    ServerUnavailableError,
)


@pytest.fixture
def brain():
    return Brain()


@pytest.fixture(params=["grpc", "http"])
def url(request, brain):
    if request.param == "http":
        pytest.importorskip("httpx", reason="pip install 'clip-embed[http]'")
    with serve(request.param, brain) as url:
        yield url


def test_embeddings_are_rows_in_the_order_of_the_images(url, tmp_path):
    """Many calls at once, each of several requests, from bytes and from files."""
    (tmp_path / "a.jpg").write_bytes(b"a file")

    async def run():
        async with AsyncEmbeddingClient(url, batch_size=3) as client:
            assert await client.is_ready()
            assert (await client.embed([])).shape == (0, 512)
            calls = [[b"%d of %d" % (k, i) for k in range(10)] for i in range(8)]
            for call, embeddings in zip(calls, await asyncio.gather(*map(client.embed, calls)), strict=True):
                assert np.array_equal(embeddings, np.stack([vector_of(image) for image in call]))
            assert np.array_equal(await client.embed([tmp_path / "a.jpg"]), [vector_of(b"a file")])

    asyncio.run(run())


def test_bad_images_are_named_by_the_callers_index(url):
    async def run():
        async with AsyncEmbeddingClient(url, batch_size=2) as client:
            await client.embed([b"a", b"b", b"c", b"bad:empty:0 bytes"])

    with pytest.raises(InvalidImageError, match=r"\[3\] empty: 0 bytes"):
        asyncio.run(run())


def test_one_failure_cancels_the_rest(url, brain):
    async def run():
        async with AsyncEmbeddingClient(url, batch_size=1) as client:
            await client.embed([b"wait", b"fail:INTERNAL:boom"])

    with pytest.raises(ServerError, match="boom"):
        asyncio.run(run())


def test_a_cancelled_call_is_cancelled_on_the_server(url, brain):
    """gRPC tells the server, HTTP drops the connection."""

    async def run():
        async with AsyncEmbeddingClient(url) as client:
            call = asyncio.create_task(client.embed([b"wait"]))
            await asyncio.to_thread(brain.waiting.acquire, timeout=10)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            if url.startswith("grpc"):
                assert await asyncio.to_thread(brain.cancelled.acquire, timeout=10)
            assert (await client.embed([b"a"])).shape == (1, 512)

    asyncio.run(run())


def test_the_deadline_covers_the_whole_call(url):
    async def run():
        async with AsyncEmbeddingClient(url, timeout_s=0.2) as client:
            await client.embed([b"wait"])

    with pytest.raises(DeadlineExceededError):
        asyncio.run(run())


def test_a_client_may_be_created_before_the_event_loop_and_closed_during_a_call(url, brain):
    """A module creates its client before there is a loop, and may close it while a call waits."""
    client = AsyncEmbeddingClient(url)

    async def run():
        call = asyncio.create_task(client.embed([b"wait"]))
        await asyncio.to_thread(brain.waiting.acquire, timeout=10)
        await client.close()
        with pytest.raises(ServerUnavailableError):
            await call
        assert not await client.is_ready()
        with pytest.raises(RuntimeError, match="closed"):
            await client.embed([b"a"])

    asyncio.run(run())


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_does_not_run_is_not_ready_and_a_call_says_what_to_do(scheme):
    with serve(scheme, Brain()) as url:
        pass

    async def run():
        async with AsyncEmbeddingClient(url, retry=None) as client:
            assert not await client.is_ready()
            with pytest.raises(ServerUnavailableError, match="start the server"):
                await client.embed([b"a"])

    asyncio.run(run())


def test_one_image_in_place_of_many_is_refused(url):
    async def run():
        async with AsyncEmbeddingClient(url) as client:
            await client.embed("photo.jpg")

    with pytest.raises(TypeError, match=r"give \[image\]"):
        asyncio.run(run())


def test_a_client_works_in_one_event_loop_after_another(url):
    """In another process, because Python closes the sockets of a closed loop at any time later."""
    script = (
        "import asyncio, sys; from clip_embed import AsyncEmbeddingClient; client = AsyncEmbeddingClient(sys.argv[1])\n"
        "for _ in range(3): print(*asyncio.run(client.embed([b'a']))[0])\n"
        "asyncio.run(client.close())"
    )
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, check=False)
    rows = [np.array(line.split(), np.float32) for line in done.stdout.splitlines()]
    assert np.array_equal(rows, [vector_of(b"a")] * 3), done.stderr


def test_a_client_in_two_event_loops_at_once_is_refused(url):
    async def run():
        async with AsyncEmbeddingClient(url) as client:
            await client.embed([b"a"])
            await asyncio.to_thread(in_another_loop, client)

    def in_another_loop(client):
        with pytest.raises(RuntimeError, match="belongs to another event loop: create one for each"):
            asyncio.run(client.embed([b"b"]))

    asyncio.run(run())


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
def test_a_server_that_answers_200_to_every_path_is_not_ready(backend):
    """As Triton's metrics port does, and a web server that has one page for all paths."""
    pytest.importorskip("httpx", reason="pip install 'clip-embed[http]'")

    class Anything(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    async def ask(url):
        async with AsyncEmbeddingClient(url, backend=backend) as client:
            return await client.is_ready()

    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        ready = asyncio.run(ask(url))
        server.shutdown()
        thread.join()
    assert not ready
