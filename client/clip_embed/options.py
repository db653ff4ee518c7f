"""What both clients are told, and how they cut a call into requests."""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, Self

from clip_embed.batches import MAX_REQUEST_BYTES, Batches, ImageSource, require_many
from clip_embed.credentials import Credentials, environment_options
from clip_embed.dispatch import Dispatch, Limits
from clip_embed.errors import ServerUnavailableError
from clip_embed.retry import Retry
from clip_embed.servers import Server, Servers, TransportT
from clip_embed.target import BACKEND_VARIABLE, DEFAULT_URL, URL_VARIABLE, Backend, Target, parse_urls
from clip_embed.wire import DEFAULT_MODEL, TEXT_MODEL

_forks = 0  # between the first of this process's ancestors and itself
_opening = threading.Lock()


def _after_fork() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1
    _opening.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_fork)


class ClientOptions(Generic[TransportT]):
    """The part of a client that does not wait."""

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
            url: `grpc://`, `grpcs://`, `http://` or `https://`; a bare host:port means gRPC. Several with commas
                between them are as `urls`.
            urls: servers of the same model, in place of `url`. Each request goes to the one with the fewest on their
                way; one that fails is left out until it is ready again, and its requests go to another.
            timeout_s: the deadline of a whole `embed`, and of each request of `embed_many`, with all attempts and the
                waits between them. None for none, and then a server that never comes back is waited for for ever.
            attempt_timeout_s: the deadline of each attempt, so that a server which hangs does not cost the whole time;
                None for none but timeout_s.
            retry: how long to wait before a request is sent again whose error is `retryable`; None to send it once.
            model: the Triton model that is asked.
            backend: "pytorch" for the service that `clip-tools bench` compares with, at an HTTP URL; it has one model.
            batch_size: images a request, at most; the server takes 64.
            max_in_flight: requests on their way at once, in each call; those that wait to be sent again are among them.
            max_batch_bytes: bytes a request, at most; a larger image goes alone. A file over both this and 32 MiB, the
                server's own limit, is refused and not read to its end.
            api_key: the key of a server that embeds only for those who have it.
            ca_file: the certificates, PEM, by which a `grpcs://` or `https://` server is known; None for the system's
                with `https://`, and for those that gRPC brings with `grpcs://`.
            cert_file: this client's own certificate, PEM, for a server that asks for one.
            key_file: its private key, PEM, not encrypted.
            transport: what carries the requests, in place of the one that the URL names.

        Raises:
            ValueError: The URL or a number makes no sense, or a file of certificates cannot be used.
            ModuleNotFoundError: An HTTP URL, without the extra `http`.
        """
        for name, value in (("timeout_s", timeout_s), ("attempt_timeout_s", attempt_timeout_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0 s, or None, got {value}")
        if batch_size < 1 or max_in_flight < 1 or not 1 <= max_batch_bytes <= MAX_REQUEST_BYTES:
            raise ValueError(
                "expected batch_size >= 1, max_in_flight >= 1 and max_batch_bytes from 1 byte to 1 GiB, "
                f"got {batch_size}, {max_in_flight} and {max_batch_bytes}"
            )
        targets = parse_urls(url if urls is None else urls, backend=backend)
        if transport is not None and len(targets) > 1:
            raise ValueError(f"expected one URL beside a transport, got {len(targets)}")
        self.url = ",".join(target.url for target in targets)
        self.model = model
        self._timeout_s = timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._retry = retry
        self._batch_size = batch_size
        self._max_in_flight = max_in_flight
        self._max_batch_bytes = max_batch_bytes
        self._credentials = Credentials(api_key=api_key, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        for target in targets:
            self._credentials.check(target)
        self._targets = targets
        self._transport: TransportT | None = transport
        # The last is in use; those of a process before a fork are kept, for their end would wait for threads of it.
        self._opened: list[Servers[TransportT]] = []
        self._forks = _forks
        self._reopen()
        self._is_closed = False
        self._texts: Self | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client cannot be pickled, for its connections cannot: make one in each process")

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of the server, or servers, that INFERENCE_SERVICE_URL names, with the constructor's other options.

        INFERENCE_BACKEND=pytorch says that it is the PyTorch service; without it, or with `triton`, it is Triton.
        CLIP_API_KEY, CLIP_CA_FILE, CLIP_CERT_FILE and CLIP_KEY_FILE are `api_key`, `ca_file`, `cert_file`, `key_file`.

        Raises:
            ValueError: The first variable is not set, or the two do not name a server.
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
    def _open(target: Target, model: str, credentials: Credentials) -> TransportT:
        raise NotImplementedError

    @property
    def _servers(self) -> Servers[TransportT]:
        """In a process that was forked they are opened anew: a connection and its threads belong to the one before."""
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
            Server(target.url, self._transport or self._open(target, self.model, self._credentials))
            for target in self._targets
        ]
        self._opened.append(Servers(servers, self._retry))

    def _of_texts(self) -> Self:
        """The client of the text tower on the same servers, which is closed with this one.

        Raises:
            ValueError: They are the PyTorch service, which embeds images alone.
        """
        if any(target.backend == "pytorch" for target in self._targets):
            raise ValueError(f"{self.url}: the PyTorch service embeds images alone; texts need the Triton server")
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
        require_many(images)
        if self._is_closed:
            raise RuntimeError("this client is closed")
        batches = Batches(
            images,
            batch_size=self._batch_size,
            max_batch_bytes=self._max_batch_bytes,
            read_ahead=4 * self._max_in_flight * self._batch_size,  # so that one slow request does not idle the others
            keep_going=keep_going,
        )
        limits = Limits(
            self._max_in_flight,
            self._timeout_s,
            is_per_request=keep_going,  # whose images may be without end
            attempt_timeout_s=self._attempt_timeout_s,
        )
        return Dispatch(batches, self._servers, limits, self._retry, now_s=self._now_s)

    def _now_s(self) -> float:
        return time.monotonic()

    def _raise_if_closed(self) -> None:
        """During a call."""
        if self._is_closed:
            raise ServerUnavailableError("the client was closed before the answer came")
