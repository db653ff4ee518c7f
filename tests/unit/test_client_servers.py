"""Retries and several servers, on real sockets; tests/unit/test_client_dispatch.py has the rules in simulated time."""

import asyncio
import itertools
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_client_loopback import Brain, serve, serve_in_a_process, vector_of

from clip_embed import (
    AsyncEmbeddingClient,
    EmbeddingClient,
    InvalidImageError,
    Retry,
    ServerOverloadedError,
    ServerUnavailableError,
)

SOON = Retry(first_wait_s=0.001, max_wait_s=0.01)
FULL = ("UNAVAILABLE", "in ensemble 'clip_ensemble', Exceeds maximum queue size")
LOST = ("UNAVAILABLE", "Socket closed")
LOADING = ("UNAVAILABLE", "Request for unknown model: 'clip_ensemble' version 1 is not at ready state")


@pytest.fixture
def brain():
    return Brain()


@pytest.fixture(params=["grpc", "http"])
def scheme(request):
    if request.param == "http":
        pytest.importorskip("httpx", reason="pip install 'clip-embed[http]'")
    return request.param


@pytest.fixture
def url(scheme, brain):
    with serve(scheme, brain) as url:
        yield url


def images_of(count):
    return [b"image %d" % index for index in range(count)]


def assert_right(results, images):
    assert len(results) == len(images)
    for result, image in zip(results, images, strict=True):
        assert np.array_equal(result, vector_of(image))


def embed_many(kind, url, images, each=lambda count: None, **options):
    """All results of the blocking or the async client. Calls `each` with the number of results so far."""
    if kind == "blocking":
        results = []
        with EmbeddingClient(url, **options) as client:
            for result in client.embed_many(images):
                results.append(result)
                each(len(results))
        return results

    async def run():
        results = []
        async with AsyncEmbeddingClient(url, **options) as client:
            async for result in client.embed_many(images):
                results.append(result)
                each(len(results))
        return results

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize("refusal", [FULL, LOST, LOADING], ids=["overloaded", "lost", "loading"])
def test_a_temporary_error_is_retried(url, brain, refusal, kind):
    """The caller does not notice, and each image is embedded once."""
    brain.refusals = [refusal] * 5
    images = images_of(20)
    assert_right(embed_many(kind, url, images, retry=SOON, batch_size=4), images)
    assert sorted(brain.embedded) == sorted(images)
    assert len(brain.requests) == 5 + 5


def test_embed_retries_too(url, brain):
    brain.refusals = [FULL, LOST]
    with EmbeddingClient(url, retry=SOON) as client:
        assert_right(client.embed(images_of(3)), images_of(3))

    async def run():
        async with AsyncEmbeddingClient(url, retry=SOON) as client:
            brain.refusals = [FULL, LOST]
            return await client.embed(images_of(3))

    assert_right(asyncio.run(run()), images_of(3))
    assert brain.requests == [3] * 6


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_bad_image_is_never_sent_again(url, brain, kind):
    """The second request has only the good images. A wrong answer is not requested again either."""
    results = embed_many(kind, url, [b"a", b"bad:corrupt:no", b"b"], retry=SOON)
    assert isinstance(results[1], InvalidImageError)
    assert brain.requests == [3, 2]
    brain.alter = lambda rows: rows[:, :256]
    embed_many(kind, url, [b"a"], retry=SOON)
    assert brain.requests == [3, 2, 1]


class Timeless(EmbeddingClient):
    """A client whose time passes only when it sleeps."""

    now_s = 0.0
    slept = 0

    def _now_s(self):
        return self.now_s

    def _sleep(self, seconds):
        self.now_s += seconds
        self.slept += 1


def test_the_last_error_is_raised_when_the_deadline_is_near(url, brain):
    """The queue is full for 15 simulated minutes. A wait that would end after the deadline is not begun."""
    brain.refusals = [FULL] * 5000
    seeded = Retry(random=random.Random(0).random)  # noqa: S311
    with Timeless(url, timeout_s=900, retry=seeded) as client, pytest.raises(ServerOverloadedError) as caught:
        client.embed([b"a"])
    assert caught.value.attempts == len(brain.requests) > 250  # waits of 2.5 s on average
    assert f"(after {len(brain.requests)} attempts)" in str(caught.value)
    assert 890 < client.now_s < 900


def test_an_unreachable_server_is_an_error_at_the_deadline(scheme):
    with serve(scheme, Brain()) as url:
        pass
    with Timeless(url, timeout_s=60) as client, pytest.raises(ServerUnavailableError, match="start the server"):
        client.embed([b"a"])
    assert client.now_s >= 60


def test_a_wait_ends_when_the_client_is_closed(url, brain):
    """However long it is."""
    brain.refusals = [FULL]
    hour = Retry(first_wait_s=3600, max_wait_s=3600, random=lambda: 1.0)
    client = EmbeddingClient(url, timeout_s=None, retry=hour)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [b"a"])
        assert brain.arrived.acquire(timeout=30)
        client.close()
        with pytest.raises(ServerUnavailableError, match="closed"):
            call.result(30)


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_no_image_is_lost_when_one_of_two_servers_is_killed(scheme, kind, caplog):
    """One of two servers is killed during embed_many; every image still has its own vector, once and in order."""
    images = images_of(600)
    with serve_in_a_process(scheme) as (one, process), serve_in_a_process(scheme) as (other, _):

        def kill(count):
            if count == 100:
                process.kill()

        results = embed_many(kind, f"{one},{other}", images, kill, batch_size=4, retry=SOON)
    assert_right(results, images)
    assert f"{one} gets no requests" in caplog.text


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_the_requests_of_a_server_that_hangs_are_retried_on_the_other(scheme, kind):
    """It accepts requests and never answers. The other server answers all of them."""
    hung, well = Brain(), Brain()
    well.gate.set()
    images = [b"wait"] * 12
    with serve(scheme, hung) as one, serve(scheme, well) as other:
        results = embed_many(kind, f"{one},{other}", images, batch_size=2, attempt_timeout_s=0.3, retry=SOON)
    assert_right(results, images)
    assert hung.requests
    assert len(well.embedded) >= len(images)


def test_a_server_that_comes_back_is_used_again(scheme, caplog):
    """On the same port. The log has its loss and its return."""
    caplog.set_level(logging.INFO, logger="clip_embed")
    with serve(scheme, Brain()) as other:
        with serve(scheme, Brain()) as url:
            pass
        with EmbeddingClient(urls=[url, other], batch_size=1, max_in_flight=2, retry=SOON) as client:
            results = client.embed_many(iter(lambda: b"a", None))
            while not any("gets no requests" in message for message in caplog.messages):
                assert np.array_equal(next(results), vector_of(b"a"))
            back = Brain()
            with serve(scheme, back, int(url.rpartition(":")[2])):
                while not back.embedded:
                    assert np.array_equal(next(results), vector_of(b"a"))
            results.close()
    assert f"{url} is ready again" in caplog.messages


def test_two_servers_share_the_work(scheme):
    brains = Brain(), Brain()
    images = images_of(40)
    with serve(scheme, brains[0]) as one, serve(scheme, brains[1]) as other:
        assert_right(embed_many("blocking", f"{one},{other}", images, batch_size=2, max_in_flight=2), images)
    assert sorted(brains[0].embedded + brains[1].embedded) == sorted(images)
    assert min(len(brain.embedded) for brain in brains) >= 10


def test_one_ready_server_of_two_is_enough(url, scheme):
    with serve(scheme, Brain()) as gone:
        pass
    with EmbeddingClient(urls=[gone, url]) as client:
        assert client.is_ready()

    async def run():
        async with AsyncEmbeddingClient(urls=[gone, url]) as client:
            return await client.is_ready()

    assert asyncio.run(run())


def test_a_client_without_a_server_waits_for_it(scheme):
    """An application may start while the server still loads its model."""
    with serve(scheme, Brain()) as url:
        pass
    with EmbeddingClient(url, retry=SOON, timeout_s=60) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.embed, [b"a"])
        brain = Brain()
        brain.refusals = [LOADING]
        with serve(scheme, brain, int(url.rpartition(":")[2])):
            assert_right(call.result(60), [b"a"])


def test_the_servers_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("INFERENCE_SERVICE_URL", "one:8001, grpc://other:8001")
    with EmbeddingClient.from_env() as client:
        assert client.url == "grpc://one:8001,grpc://other:8001"


@pytest.mark.parametrize("bad", [[], ["one:1", "grpc://one:1"], ["one:1", ""], ["one:1", "ftp://x"]])
def test_invalid_urls_are_refused(bad):
    with pytest.raises(ValueError):
        EmbeddingClient(urls=bad)


def test_results_may_be_abandoned(url, brain):
    """Closing an endless embed_many leaves no requests in flight."""
    with EmbeddingClient(url, batch_size=1, max_in_flight=3) as client:
        results = client.embed_many(iter(lambda: b"a", None))
        assert len(list(itertools.islice(results, 5))) == 5
        results.close()
        assert [server.in_flight for server in client._servers._servers] == [0]

    async def run():
        async with AsyncEmbeddingClient(url, batch_size=1, max_in_flight=3) as client:
            results = client.embed_many(iter(lambda: b"a", None))
            assert np.array_equal(await anext(results), vector_of(b"a"))
            await results.aclose()
            assert [server.in_flight for server in client._servers._servers] == [0]

    asyncio.run(run())
