"""Which hosts are this machine, where the environment has a proxy."""

import os
import urllib.request

import httpx
import pytest

from clip_embed.target import parse_url
from clip_tools import proxy


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, []),
        ({"no_proxy": "a"}, ["a"]),
        ({"NO_PROXY": "b"}, ["b"]),
        ({"no_proxy": "a", "NO_PROXY": "b"}, ["a", "b"]),
    ],
)
def test_this_machine_is_added_to_what_needs_no_proxy(monkeypatch, given, kept):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, given.get(name, ""))
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    proxy.leave_this_machine_out()
    for name in ("no_proxy", "NO_PROXY"):
        assert os.environ[name].split(",") == [*kept, "localhost", "127.0.0.1", "::1"]
    assert urllib.request.proxy_bypass("localhost:8000")
    assert not urllib.request.proxy_bypass("hub.example")
    httpx.Client().close()  # which refuses a list that it cannot read


def test_where_nothing_goes_to_the_proxy_it_stays_so(monkeypatch):
    """Beside other names `*` would be one of them."""
    monkeypatch.setenv("no_proxy", "*")
    proxy.leave_this_machine_out()
    assert os.environ["no_proxy"] == "*"
    assert urllib.request.proxy_bypass("hub.example")


@pytest.mark.parametrize("host", ["localhost", "localhost.", "127.0.0.1", "127.0.0.2", "[::1]", "0.0.0.0", "[::]"])  # noqa: S104
def test_a_url_of_this_machine_is_local(host):
    assert parse_url(f"grpc://{host}:8001").is_local
    assert parse_url(f"http://{host}:8000").is_local


@pytest.mark.parametrize("host", ["gpu-host", "10.0.0.1", "localhost.example", "[2001:db8::1]"])
def test_another_machine_is_not(host):
    assert not parse_url(f"grpc://{host}:8001").is_local
