"""How a request reaches the server: two small protocols that tests can replace, and the choice by URL."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol, get_args
from urllib.parse import urlsplit

from clip_embed.wire import Embeddings, ImageBytes

DEFAULT_URL = "grpc://localhost:8001"
URL_VARIABLE = "INFERENCE_SERVICE_URL"
BACKEND_VARIABLE = "INFERENCE_BACKEND"

Backend = Literal["triton", "pytorch"]
"""Who answers: the Triton server, or the PyTorch service that `clip-tools bench` compares it with."""


class Transport(Protocol):
    """Thread-safe. `timeout_s` is the time from now, None for no limit; errors are EmbeddingErrors."""

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        """The (N, 512) answer to come; cancelling it also cancels the request on the server."""

    def is_ready(self, timeout_s: float | None) -> bool: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same for one event loop."""

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings: ...

    async def is_ready(self, timeout_s: float | None) -> bool: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """A server: `address` is host:port for gRPC and the base URL for HTTP; `url` is how messages name it."""

    url: str
    is_http: bool
    is_secure: bool
    address: str
    backend: Backend = "triton"


def parse_url(url: str, *, backend: Backend = "triton") -> Target:
    """The server that a URL names; a bare host:port means gRPC.

    Raises:
        ValueError: Another scheme, no host, no port for gRPC, parts that mean nothing here, an unknown backend, or a
            gRPC URL for the one that speaks HTTP alone.
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
        raise ValueError(f"{url!r}: the pytorch backend speaks HTTP alone; expected http://HOST:PORT")
    return Target(full, is_http, parts.scheme in ("https", "grpcs"), full if is_http else parts.netloc, backend)


def open_transport(target: Target, model: str) -> Transport:
    """Connects at the first request, not now."""
    if target.is_http:
        _require_httpx()
        from clip_embed.http_transport import HttpTransport
        from clip_embed.pytorch_transport import PyTorchTransport

        if target.backend == "pytorch":
            return PyTorchTransport(target, model)
        return HttpTransport(target, model)
    from clip_embed.grpc_transport import GrpcTransport

    return GrpcTransport(target, model)


def open_async_transport(target: Target, model: str) -> AsyncTransport:
    """Connects at the first request, not now; needs no running event loop yet."""
    if target.is_http:
        _require_httpx()
        from clip_embed.http_transport import AsyncHttpTransport
        from clip_embed.pytorch_transport import AsyncPyTorchTransport

        if target.backend == "pytorch":
            return AsyncPyTorchTransport(target, model)
        return AsyncHttpTransport(target, model)
    from clip_embed.grpc_transport import AsyncGrpcTransport

    return AsyncGrpcTransport(target, model)


def _require_httpx() -> None:
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an http:// URL needs httpx: pip install 'clip-embed[http]'") from error
