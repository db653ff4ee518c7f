"""Parses the URL of a server."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

DEFAULT_URL = "grpc://localhost:8001"
URL_VARIABLE = "INFERENCE_SERVICE_URL"
BACKEND_VARIABLE = "INFERENCE_BACKEND"

Backend = Literal["triton", "pytorch"]
"""The kind of server: Triton, or the PyTorch service that `clip-tools bench` compares it with."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server. `address` is host:port for gRPC and the base URL for HTTP; messages show `url`.

    `is_local`: it is on this machine, so the environment's proxy, on another machine, cannot reach it.
    """

    url: str
    is_http: bool
    is_secure: bool
    address: str
    is_local: bool = False
    backend: Backend = "triton"


def parse_url(url: str, *, backend: Backend = "triton") -> Endpoint:
    """The server that a URL names; a bare host:port means gRPC.

    Raises:
        ValueError: Another scheme, no host, no port for gRPC, other parts of a URL, an unknown backend, or a gRPC URL
            for the PyTorch backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
    full = url if "://" in url else f"grpc://{url}"
    try:
        parts = urlsplit(full)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is not a server's URL: {error}") from error
    is_http = parts.scheme in ("http", "https")
    is_grpc = parts.scheme in ("grpc", "grpcs")
    if not (is_http or is_grpc) or not host or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{url!r}: expected grpc://HOST:PORT, grpcs://, http:// or https://, or a bare HOST:PORT")
    if is_grpc and (port is None or parts.path.strip("/")):
        raise ValueError(f"{url!r}: a gRPC server is HOST:PORT, such as {DEFAULT_URL}")
    if backend == "pytorch" and not is_http:
        raise ValueError(f"{url!r}: the pytorch backend speaks only HTTP; expected http://HOST:PORT")
    is_secure = parts.scheme in ("https", "grpcs")
    return Endpoint(full, is_http, is_secure, full if is_http else parts.netloc, _is_local(host), backend)


def parse_urls(urls: str | Iterable[str], *, backend: Backend = "triton") -> tuple[Endpoint, ...]:
    """The servers of a list of URLs, or of one text with commas between them.

    Raises:
        ValueError: There is no URL, one occurs twice, or one is invalid.
    """
    given = urls.split(",") if isinstance(urls, str) else list(urls)
    endpoints = tuple(parse_url(url.strip(), backend=backend) for url in given)
    if not endpoints or len({endpoint.url for endpoint in endpoints}) < len(endpoints):
        raise ValueError(f"expected one or more different URLs, got {', '.join(given) or 'none'}")
    return endpoints


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") == "localhost"
    return address.is_loopback or address.is_unspecified
