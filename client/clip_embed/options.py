"""The options of both clients, and how they start a call."""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, Self

from clip_embed.batches import MAX_REQUEST_BYTES, Batches, ImageSource, require_sequence
from clip_embed.credentials import Credentials, environment_options
from clip_embed.dispatch import Dispatch, RequestLimits
from clip_embed.endpoint import BACKEND_VARIABLE, DEFAULT_URL, URL_VARIABLE, Backend, Endpoint, parse_urls
from clip_embed.errors import ServerUnavailableError
from clip_embed.retry import Retry
from clip_embed.servers import Server, Servers, TransportT
from clip_embed.wire import DEFAULT_MODEL, TEXT_MODEL

_forks = 0  # how many forks this process is away from the first one
_opening = threading.Lock()


def _after_fork() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1
    _opening.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_fork)


class ClientOptions(Generic[TransportT]):
    """Base class of both clients: their options, and how a call starts."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        urls: Sequence[str] | None = None,
        timeout_s: float | None = 30.0,
        attempt_timeout_s: float | None = None,
        retry: Retry | None = Retry(),  # noqa: B008  it is frozen
        model: str = DEFAULT_MODEL,
        backend: Backend = "triton",
        batch_size: int = 8,
        max_in_flight: int = 8,
        max_batch_bytes: int = 32 << 20,
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
        transport: TransportT | None = None,
    ) -> None:
        """A client that connects at its first request.

        Args:
            url: `grpc://`, `grpcs://`, `http://` or `https://`; a bare host:port means gRPC. Several URLs with commas
                between them are the same as `urls`.
            urls: servers of the same model, in place of `url`. Each request goes to the server with the fewest in
                flight. A server that fails gets no requests until it is ready again; another one takes its requests.
            timeout_s: the deadline of a whole `embed`, and of each request of `embed_many`, with all attempts and the
                waits between them. With None, the client waits for a lost server for ever.
            attempt_timeout_s: the deadline of each attempt, so that a hanging server does not use up the whole time;
                None for no other deadline than timeout_s.
            retry: how long to wait before a request with a `retryable` error is sent again; None to send it once.
            model: the Triton model to ask.
            backend: "pytorch" for the service that `clip-tools bench` compares with, at an HTTP URL; it has one model.
            batch_size: images per request; the server accepts at most 64.
            max_in_flight: requests of each call in flight at once, including those that wait to be sent again.
            max_batch_bytes: bytes per request; a larger image is sent alone. A file over both this and 32 MiB, the
                server's own limit, is refused and not read to its end.
            api_key: the API key, for a server that requires one.
            ca_file: PEM certificates of the authorities to trust for `grpcs://` and `https://`; None for the system's
                (`https://`) or gRPC's own (`grpcs://`).
            cert_file: this client's PEM certificate, for a server that requires one.
            key_file: its private key, unencrypted PEM.
            transport: replaces the transport that the URL selects.

        Raises:
            ValueError: The URL or a number is invalid, or a certificate file cannot be used.
            ModuleNotFoundError: The URL is HTTP, and the extra `http` is not installed.
        """
        for name, value in (("timeout_s", timeout_s), ("attempt_timeout_s", attempt_timeout_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0 s, or None, got {value}")
        if batch_size < 1 or max_in_flight < 1 or not 1 <= max_batch_bytes <= MAX_REQUEST_BYTES:
            raise ValueError(
                "expected batch_size >= 1, max_in_flight >= 1 and max_batch_bytes from 1 byte to 1 GiB, "
                f"got {batch_size}, {max_in_flight} and {max_batch_bytes}"
            )
        endpoints = parse_urls(url if urls is None else urls, backend=backend)
        if transport is not None and len(endpoints) > 1:
            raise ValueError(f"expected one URL beside a transport, got {len(endpoints)}")
        self.url = ",".join(endpoint.url for endpoint in endpoints)
        self.model = model
        self._timeout_s = timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._retry = retry
        self._batch_size = batch_size
        self._max_in_flight = max_in_flight
        self._max_batch_bytes = max_batch_bytes
        self._credentials = Credentials(api_key=api_key, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        for endpoint in endpoints:
            self._credentials.check(endpoint)
        self._endpoints = endpoints
        self._transport: TransportT | None = transport
        # The last is in use. Those from before a fork stay open: closing them would wait for the parent's threads.
        self._opened: list[Servers[TransportT]] = []
        self._forks = _forks
        self._reopen()
        self._is_closed = False
        self._texts: Self | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client cannot be pickled, because its connections cannot: create one in each process")

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of the servers in INFERENCE_SERVICE_URL; `options` are the constructor's.

        INFERENCE_BACKEND=pytorch selects the PyTorch service; the default is `triton`. CLIP_API_KEY, CLIP_CA_FILE,
        CLIP_CERT_FILE and CLIP_KEY_FILE set `api_key`, `ca_file`, `cert_file` and `key_file`.

        Raises:
            ValueError: INFERENCE_SERVICE_URL is not set, or one of the first two variables is invalid.
        """
        url = os.environ.get(URL_VARIABLE)
        if not url:
            raise ValueError(f"{URL_VARIABLE} is not set; for example {URL_VARIABLE}={DEFAULT_URL}")
        options.setdefault("backend", os.environ.get(BACKEND_VARIABLE) or "triton")
        try:
            parse_urls(url, backend=options["backend"])
        except ValueError as error:
            raise ValueError(f"{URL_VARIABLE}, {BACKEND_VARIABLE}: {error}") from error
        return cls(url, **{**environment_options(os.environ), **options})

    @staticmethod
    def _open(endpoint: Endpoint, model: str, credentials: Credentials) -> TransportT:
        raise NotImplementedError

    @property
    def _servers(self) -> Servers[TransportT]:
        """The servers. A forked process opens them again, because connections and threads belong to its parent."""
        with _opening:
            if self._is_forked:
                self._reopen()
            return self._opened[-1]

    @property
    def _is_forked(self) -> bool:
        return self._forks != _forks

    def _reopen(self) -> None:
        if not self._is_forked:
            self._opened.clear()
        self._forks = _forks
        servers: list[Server[TransportT]] = [
            Server(endpoint.url, self._transport or self._open(endpoint, self.model, self._credentials))
            for endpoint in self._endpoints
        ]
        self._opened.append(Servers(servers, self._retry))

    def _text_client(self) -> Self:
        """A client for the text tower on the same servers, closed together with this one.

        Raises:
            ValueError: The server is the PyTorch service, which embeds only images.
        """
        if any(endpoint.backend == "pytorch" for endpoint in self._endpoints):
            raise ValueError(f"{self.url}: the PyTorch service embeds only images; texts need the Triton server")
        if self.model == TEXT_MODEL:
            return self
        with _opening:
            if self._texts is None:
                texts = object.__new__(type(self))
                vars(texts).update(vars(self), model=TEXT_MODEL, _opened=[])
                texts._reopen()
                self._texts = texts
            return self._texts

    def _dispatch(self, images: Iterable[ImageSource], *, keep_going: bool) -> Dispatch[TransportT]:
        require_sequence(images)
        if self._is_closed:
            raise RuntimeError("this client is closed")
        batches = Batches(
            images,
            batch_size=self._batch_size,
            max_batch_bytes=self._max_batch_bytes,
            read_ahead=4 * self._max_in_flight * self._batch_size,  # so that one slow request does not idle the others
            keep_going=keep_going,
        )
        limits = RequestLimits(
            self._max_in_flight,
            self._timeout_s,
            is_per_request=keep_going,  # the images may be endless
            attempt_timeout_s=self._attempt_timeout_s,
        )
        return Dispatch(batches, self._servers, limits, self._retry, now_s=self._now_s)

    def _now_s(self) -> float:
        return time.monotonic()

    def _raise_if_closed(self) -> None:
        """Raises ServerUnavailableError during a call on a closed client."""
        if self._is_closed:
            raise ServerUnavailableError("the client was closed before the answer came")
