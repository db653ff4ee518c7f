"""The HTTP transport: httpx, with Triton's binary tensors serialised by `wire`.

It does not use `tritonclient.http`, which is built on gevent: a gevent hub belongs to one thread, so threads could not
share a client.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from clip_embed.credentials import Credentials
from clip_embed.endpoint import Endpoint
from clip_embed.errors import ContractError, error_from_grpc, error_from_http
from clip_embed.server_info import ServerInfo
from clip_embed.wire import HEADER_LENGTH, Embeddings, ImageBytes, http_request, input_name, read_http_answer

T = TypeVar("T")


def _proxy_of(endpoint: Endpoint) -> httpx.Proxy | None:
    """The environment's proxy for a server on another machine, in every form that urllib accepts.

    Raises:
        ValueError: The proxy cannot be used for HTTP.
    """
    parts, proxies = urlsplit(endpoint.address), getproxies()
    if endpoint.is_local or "*" in proxies.get("no", "").split(","):
        return None
    if proxy_bypass(parts.netloc) or proxy_bypass(parts.hostname or ""):  # IPv6 with and without brackets
        return None
    if not (given := (proxies.get(parts.scheme) or proxies.get("all", "")).strip()):
        return None
    scheme, found, rest = given.partition("://")
    if not found:
        scheme, rest = "http", given.removeprefix("//")
    login, has_login, host = rest.rpartition("@")
    user, _, password = login.partition(":")
    url = f"{scheme}://{host.partition('/')[0]}"
    try:
        proxy = httpx.Proxy(url, auth=(unquote(user), unquote(password)) if has_login else None)
        if not proxy.url.host:
            raise ValueError("no host")
        if proxy.url.scheme.startswith("socks"):
            import_module("socksio")  # httpx needs it for SOCKS
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise ValueError(
            f"{parts.scheme}_proxy or all_proxy of the environment: expected http://HOST:PORT, got {url}: {error}"
        ) from error
    return proxy


class AsyncHttpTransport:
    """Implements `transport.AsyncTransport`."""

    def __init__(self, endpoint: Endpoint, model: str, credentials: Credentials) -> None:
        self._url = endpoint.url
        self._input = input_name(model)
        self._model_path = f"v2/models/{quote(model, safe='')}"
        self._http = httpx.AsyncClient(
            base_url=endpoint.address,
            verify=credentials.ssl_context() if endpoint.is_secure else True,
            trust_env=False,  # httpx raises for some NO_PROXY lists that the standard library accepts
            proxy=_proxy_of(endpoint),
            timeout=None,  # noqa: S113  httpx limits each read and write, _request the whole request
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            # Do not let Triton gzip the answer: that costs time, and floats do not compress.
            headers={"Accept-Encoding": "identity", **credentials.http_headers()},
        )

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings:
        headers, body = http_request(images, self._input)
        answer = await self._request("POST", f"{self._model_path}/infer", timeout_s, headers=headers, content=body)
        if answer.status_code != httpx.codes.OK:
            raise error_from_http(answer.status_code, answer.content, url=self._url)
        return read_http_answer(answer.content, answer.headers.get(HEADER_LENGTH), len(images))

    async def is_ready(self, timeout_s: float | None) -> bool:
        return await self._is_inference_server(f"{self._model_path}/ready", f"{self._model_path}/infer", timeout_s)

    async def server_info(self, timeout_s: float | None) -> ServerInfo:
        answer = await self._request("GET", f"{self._model_path}/config", timeout_s)
        if answer.status_code != httpx.codes.OK:
            raise error_from_http(answer.status_code, answer.content, url=self._url)
        try:
            parameters = answer.json().get("parameters", {})
            return ServerInfo.of({name: parameter["string_value"] for name, parameter in parameters.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ContractError(f"expected a model's configuration, got {answer.content[:200]!r}") from error

    async def close(self) -> None:
        await self._http.aclose()

    async def _is_inference_server(self, ready: str, embed: str, timeout_s: float | None) -> bool:
        """Whether GET succeeds for `ready` but not for `embed`, a POST path: Triton's metrics port accepts any path."""
        answer = await self._request("GET", ready, timeout_s)
        return answer.is_success and not (await self._request("GET", embed, timeout_s)).is_success

    async def _request(self, method: str, path: str, timeout_s: float | None, **content: Any) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._http.request(method, path, **content)
        except TimeoutError as error:
            raise error_from_grpc("DEADLINE_EXCEEDED", "no answer in time", url=self._url) from error
        except httpx.TransportError as error:
            raise error_from_grpc("UNAVAILABLE", f"{type(error).__name__} {error}", url=self._url) from error


class HttpTransport:
    """Implements `transport.Transport` by running the async transport on an event loop in another thread.

    So the deadline is that of the whole request, and cancelling ends a request on the wire. A blocking httpx call can
    do neither.
    """

    async_transport: Callable[[Endpoint, str, Credentials], AsyncHttpTransport] = AsyncHttpTransport

    def __init__(self, endpoint: Endpoint, model: str, credentials: Credentials) -> None:
        self._transport = type(self).async_transport(endpoint, model, credentials)
        self._lock = threading.Lock()  # no work may enter a loop that is being stopped: it would never end
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clip-embed-http", daemon=True)
        self._thread.start()

    def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Future[Embeddings]:
        return self._start(self._transport.send, images, timeout_s)

    def is_ready(self, timeout_s: float | None) -> Future[bool]:
        return self._start(self._transport.is_ready, timeout_s)

    def server_info(self, timeout_s: float | None) -> Future[ServerInfo]:
        return self._start(self._transport.server_info, timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> Future[T]:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this client is closed")
            return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop)

    async def _finish(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._transport.close()
