"""How a request reaches the server: two small protocols that tests can replace, and the choice by URL."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from clip_embed.credentials import Credentials
from clip_embed.served import Served
from clip_embed.target import Target
from clip_embed.wire import Embeddings, ImageBytes


class Transport(Protocol):
    """Thread-safe. `timeout_s` is the time from now, None for no limit; the errors of answers are EmbeddingErrors."""

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        """The (N, D) answer to come; cancelling it also cancels the request on the server."""

    def is_ready(self, timeout_s: float | None) -> Future[bool]:
        """Whether the server says that its model can be asked, in an answer to come."""

    def served(self, timeout_s: float | None) -> Future[Served]:
        """What the server says of itself, in an answer to come."""

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same for one event loop."""

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings: ...

    async def is_ready(self, timeout_s: float | None) -> bool: ...

    async def close(self) -> None: ...


def open_transport(target: Target, model: str, credentials: Credentials) -> Transport:
    """Connects at the first request, not now."""
    if target.is_http:
        _require_httpx()
        from clip_embed.http_transport import HttpTransport
        from clip_embed.pytorch_transport import PyTorchTransport

        if target.backend == "pytorch":
            return PyTorchTransport(target, model, credentials)
        return HttpTransport(target, model, credentials)
    from clip_embed.grpc_transport import GrpcTransport

    return GrpcTransport(target, model, credentials)


def open_async_transport(target: Target, model: str, credentials: Credentials) -> AsyncTransport:
    """Connects at the first request, not now; needs no running event loop yet."""
    if target.is_http:
        _require_httpx()
        from clip_embed.http_transport import AsyncHttpTransport
        from clip_embed.pytorch_transport import AsyncPyTorchTransport

        if target.backend == "pytorch":
            return AsyncPyTorchTransport(target, model, credentials)
        return AsyncHttpTransport(target, model, credentials)
    from clip_embed.grpc_transport import AsyncGrpcTransport

    return AsyncGrpcTransport(target, model, credentials)


def _require_httpx() -> None:
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an http:// URL needs httpx: pip install 'clip-embed[http]'") from error
