"""`clip-tools serve` and `health` without a server: URLs, the first image, the check of vectors, usage errors."""

import sys

import numpy as np
import pytest

from clip_embed import (
    DeadlineExceededError,
    InvalidImageError,
    ServerError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from clip_embed.endpoint import parse_url
from clip_tools.accuracy.sample import Sample
from clip_tools.errors import ToolError
from clip_tools.serving import server as embedded
from clip_tools.serving.health import check_health
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::", "[::1]"), ("::1", "[::1]")],  # noqa: S104
)
def test_urls_name_a_host_that_this_machine_can_reach(host, reached_at):
    options = ServeOptions(host=host)
    assert options.grpc_url == f"grpc://{reached_at}:8001"
    assert options.http_url == f"http://{reached_at}:8000"
    assert options.metrics_url == f"http://{reached_at}:8002/metrics"
    assert parse_url(options.grpc_url).address == f"{reached_at}:8001"


def test_an_ipv6_address_is_written_as_each_part_of_triton_reads_it():
    flags = EmbeddedServer(ServeOptions(host="::1"))._flags()
    assert {"--http-address=ipv6:::1", "--grpc-address=[::1]", "--metrics-address=ipv6:::1"} < set(flags)
    assert "--grpc-address=127.0.0.1" in EmbeddedServer(ServeOptions())._flags()


def raise_(error):
    if error:
        raise error


class Process:
    is_stopping = False

    def raise_if_ended(self):
        pass

    def log_reason(self):
        return "none"


class Client:
    """`embed` raises the given errors in turn. It succeeds for a None, and when no error is left."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def is_ready(self):
        return True

    def embed(self, _images):
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return np.ones((1, 512), np.float32)


def started(monkeypatch, client, **options):
    monkeypatch.setattr(EmbeddedServer, "client", lambda _self, *, timeout_s: client)
    nobody = ServeOptions(metrics_port=1, **options)
    server = EmbeddedServer(nobody)
    server._process = Process()
    server._text_models = []  # even if a text tower was exported
    return server


def test_the_first_image_is_sent_again_while_the_server_is_busy(monkeypatch):
    client = Client(DeadlineExceededError("slow"), DeadlineExceededError("slow"))
    started(monkeypatch, client).wait_until_ready()
    assert not client.errors


def test_a_server_that_stays_busy_until_the_timeout_is_an_error(monkeypatch):
    server = started(monkeypatch, Client(*[DeadlineExceededError("slow")] * 1000), ready_timeout_s=0.3)
    with pytest.raises(ToolError, match=r"loaded but busy: slow; the server was not ready after"):
        server.wait_until_ready()


def test_a_first_image_that_fails_for_another_reason_is_not_sent_again(monkeypatch):
    client = Client(ServerError("no such tensor"), ServerOverloadedError("not reached"))
    with pytest.raises(ToolError, match="loaded but does not embed: no such tensor"):
        started(monkeypatch, client).wait_until_ready()
    assert len(client.errors) == 1


@pytest.fixture
def three(monkeypatch):
    """A sample of three photographs. Its check accepts any vectors."""
    sample = Sample(("m", "p"), (b"a", b"b", b"c"), np.zeros((3, 224, 224, 3), np.uint8), np.zeros((3, 512)))
    monkeypatch.setattr(embedded, "check_vectors", lambda _, embed: f"its vectors are {embed(sample).shape}")


def test_a_photograph_of_the_sample_is_sent_again_while_the_server_is_full(monkeypatch, three):
    """Photographs that were already embedded are not sent again."""
    client = Client(None, None, ServerOverloadedError("full"), DeadlineExceededError("slow"))
    assert started(monkeypatch, client, check_vectors=True).wait_until_ready() == "its vectors are (3, 512)"
    assert not client.errors


@pytest.mark.parametrize(
    "errors", [[ServerOverloadedError("full")] * 1000, [InvalidImageError("too_many_pixels")]], ids=["full", "limits"]
)
def test_a_server_that_stays_full_or_refuses_the_sample_serves_unverified(monkeypatch, three, errors):
    monkeypatch.setattr(embedded, "_CHECK_S", 0.3)
    server = started(monkeypatch, Client(None, *errors), check_vectors=True)
    assert server.wait_until_ready() == f"the vectors were not verified against open_clip: {errors[0]}"


def test_a_server_that_is_lost_during_the_check_is_not_ready(monkeypatch, three):
    """If its process has ended, the error says why."""
    for ended, words in ((False, "loaded but does not embed: connection refused"), (True, "out of memory")):
        server = started(monkeypatch, Client(None, ServerUnavailableError("connection refused")), check_vectors=True)
        if ended:
            looks = iter([None, ToolError("out of memory")])
            monkeypatch.setattr(server._process, "raise_if_ended", lambda: raise_(next(looks)), raising=False)  # noqa: B023
        with pytest.raises(ToolError, match=words):
            server.wait_until_ready()


def test_a_server_that_is_stopped_during_the_check_is_not_ready(monkeypatch, three):
    server = started(monkeypatch, Client(None, ServerOverloadedError("full")), check_vectors=True)
    stops = iter([False, True])
    monkeypatch.setattr(Process, "is_stopping", property(lambda _: next(stops)))
    with pytest.raises(ToolError, match="was stopped before its vectors were verified"):
        server.wait_until_ready()


@pytest.mark.parametrize(
    ("url", "environment", "words"),
    [
        ("ftp://localhost", {}, "expected grpc://HOST:PORT"),
        ("grpc://localhost:1", {"CLIP_CA_FILE": "ca.pem"}, "this URL is not encrypted"),
    ],
)
def test_an_unusable_url_is_a_usage_error(monkeypatch, url, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ToolError, match=words) as caught:
        check_health(url, 1)
    assert caught.value.exit_code == 2


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ToolError, match="an http:// URL needs httpx") as caught:
        check_health("http://localhost:1", 1)
    assert caught.value.exit_code == 2
