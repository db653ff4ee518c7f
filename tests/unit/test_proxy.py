"""Proxy settings in the environment: which hosts bypass the proxy, and which settings are accepted."""

import os
import urllib.request

import httpx
import pytest

from clip_embed import EmbeddingClient
from clip_embed.endpoint import parse_url
from clip_embed.http_transport import _proxy_of
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
def test_localhost_is_added_to_no_proxy(monkeypatch, given, kept):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, given.get(name, ""))
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    proxy.bypass_for_localhost()
    for name in ("no_proxy", "NO_PROXY"):
        assert os.environ[name].split(",") == [*kept, "localhost", "127.0.0.1", "::1"]
    assert urllib.request.proxy_bypass("localhost:8000")
    assert not urllib.request.proxy_bypass("hub.example")
    httpx.Client().close()  # httpx refuses a list that it cannot parse


def test_a_no_proxy_of_star_is_kept(monkeypatch):
    """Next to other names, urllib would take `*` for a host name."""
    monkeypatch.setenv("no_proxy", "*")
    proxy.bypass_for_localhost()
    assert os.environ["no_proxy"] == "*"
    assert urllib.request.proxy_bypass("hub.example")


@pytest.mark.parametrize("host", ["localhost", "localhost.", "127.0.0.1", "127.0.0.2", "[::1]", "0.0.0.0", "[::]"])  # noqa: S104
def test_a_url_of_this_machine_is_local(host):
    assert parse_url(f"grpc://{host}:8001").is_local
    assert parse_url(f"http://{host}:8000").is_local


@pytest.mark.parametrize("host", ["gpu-host", "10.0.0.1", "localhost.example", "[2001:db8::1]"])
def test_a_url_of_another_machine_is_not_local(host):
    assert not parse_url(f"grpc://{host}:8001").is_local


@pytest.fixture
def environment(monkeypatch):
    def environment(**variables):
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.setenv(name, variables.get(name, ""))
            monkeypatch.delenv(name.upper(), raising=False)

    return environment


@pytest.mark.parametrize(
    "given", ["proxy:3128", "//proxy:3128", "http://proxy:3128", " HTTP://proxy:3128/x ", "[::1]:3128"]
)
@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_every_form_of_proxy_that_urllib_accepts_is_accepted(environment, given, variable):
    environment(**{variable: given})
    assert _proxy_of(parse_url("http://gpu-host:8000")).url.port == 3128
    EmbeddingClient("http://gpu-host:8000").close()


@pytest.mark.parametrize(
    ("given", "login"),
    [
        ("u:p%40s@proxy:1", b"p@s"),
        ("http://u:p@s@proxy:1", b"p@s"),
        ("http://u:p#/s@proxy:1", b"p#/s"),
        ("u@proxy:1", b""),
    ],
)
def test_a_proxy_password_may_have_any_character_and_no_error_shows_it(environment, given, login):
    environment(http_proxy=given)
    assert _proxy_of(parse_url("http://gpu-host:8000")).raw_auth == (b"u", login)
    environment(http_proxy=given.replace(":1", ":port"))
    with pytest.raises(ValueError, match="http_proxy") as caught:
        EmbeddingClient("http://gpu-host:8000")
    assert "p@s" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["socks4://proxy:1", "socks5://proxy:1", "ftp://proxy", "proxy:port", "http://", "a\x07:1"]
)
def test_an_unusable_proxy_is_refused_with_the_expected_form(environment, given):
    environment(all_proxy=given)
    with pytest.raises(ValueError, match="http_proxy or all_proxy of the environment: expected http://HOST:PORT, got"):
        EmbeddingClient("http://gpu-host:8000")
    EmbeddingClient("http://localhost:8000").close()


@pytest.mark.parametrize(
    ("left_out", "hosts"),
    [
        ("gpu-host", ["gpu-host:8000"]),
        (".example.org,,gpu-host:8000", ["gpu-host:8000", "a.example.org:8000", "example.org"]),
        ("2001:db8::1,10.0.0.1", ["[2001:db8::1]:8000", "10.0.0.1:8000"]),
        ("[2001:db8::1]", ["[2001:db8::1]:8000"]),
        ("*", ["gpu-host:8000", "10.0.0.1"]),
        ("x,*", ["gpu-host:8000"]),
        ("10.0.0.0/8,[::1],::1/128,http://x,*.y,a b", []),
    ],
)
def test_every_form_of_no_proxy_is_accepted(environment, left_out, hosts):
    environment(http_proxy="proxy:3128", no_proxy=left_out)
    for host in hosts:
        assert _proxy_of(parse_url(f"http://{host}")) is None
    assert (_proxy_of(parse_url("http://other:8000")) is None) == ("*" in left_out.split(","))
    EmbeddingClient("http://other:8000").close()
