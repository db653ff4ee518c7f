"""The transport interfaces, and the transport for each kind of URL."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from clip_embed.credentials import Credentials
from clip_embed.endpoint import Endpoint
from clip_embed.server_info import ServerInfo
from clip_embed.wire import Embeddings, ImageBytes


class Transport(Protocol):
    """Sends requests; thread-safe. `timeout_s` counts from now, None for no limit. Answers fail with EmbeddingError."""

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        """A future of the (N, D) embeddings. Cancelling it also cancels the request on the server."""

    def is_ready(self, timeout_s: float | None) -> Future[bool]:
        """A future that tells whether the server reports its model as ready."""

    def server_info(self, timeout_s: float | None) -> Future[ServerInfo]:
        """A future of what the server reports about its model."""

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same, for one event loop."""

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings: ...

    async def is_ready(self, timeout_s: float | None) -> bool: ...

    async def close(self) -> None: ...


def open_transport(endpoint: Endpoint, model: str, credentials: Credentials) -> Transport:
    """The transport for a server. It connects at the first request."""
    if endpoint.is_http:
        _require_httpx()
        from clip_embed.http_transport import HttpTransport
        from clip_embed.pytorch_transport import PyTorchTransport

        if endpoint.backend == "pytorch":
            return PyTorchTransport(endpoint, model, credentials)
        return HttpTransport(endpoint, model, credentials)
    from clip_embed.grpc_transport import GrpcTransport

    return GrpcTransport(endpoint, model, credentials)


def open_async_transport(endpoint: Endpoint, model: str, credentials: Credentials) -> AsyncTransport:
    """The async transport for a server. It connects at the first request and needs no event loop before."""
    if endpoint.is_http:
        _require_httpx()
        from clip_embed.http_transport import AsyncHttpTransport
        from clip_embed.pytorch_transport import AsyncPyTorchTransport

        if endpoint.backend == "pytorch":
            return AsyncPyTorchTransport(endpoint, model, credentials)
        return AsyncHttpTransport(endpoint, model, credentials)
    from clip_embed.grpc_transport import AsyncGrpcTransport

    return AsyncGrpcTransport(endpoint, model, credentials)


def _require_httpx() -> None:
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an http:// URL needs httpx: pip install 'clip-embed[http]'") from error
