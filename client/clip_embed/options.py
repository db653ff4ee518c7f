"""What both clients are told, and how they cut a call into requests."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, Self, TypeVar

from clip_embed.batches import MAX_REQUEST_BYTES, Batches, ImageSource, require_many
from clip_embed.errors import DeadlineExceededError
from clip_embed.transport import (
    BACKEND_VARIABLE,
    DEFAULT_URL,
    URL_VARIABLE,
    AsyncTransport,
    Backend,
    Target,
    Transport,
    parse_url,
)
from clip_embed.wire import DEFAULT_MODEL

TransportT = TypeVar("TransportT", Transport, AsyncTransport)


class ClientOptions(Generic[TransportT]):
    """The part of a client that does not wait."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float | None = 30.0,
        model: str = DEFAULT_MODEL,
        backend: Backend = "triton",
        batch_size: int = 8,
        max_in_flight: int = 8,
        max_batch_bytes: int = 32 << 20,
        transport: TransportT | None = None,
    ) -> None:
        """A client that connects at its first request.

        Args:
            url: `grpc://`, `grpcs://`, `http://` or `https://`; a bare host:port means gRPC.
            timeout_s: the deadline of a whole `embed`, and of each request of `embed_each`; None for none.
            model: the Triton model that is asked.
            backend: "pytorch" for the service that `clip-tools bench` compares with, at an HTTP URL; it has one model.
            batch_size: images a request, at most; the server takes 64.
            max_in_flight: requests on their way at once, in each call.
            max_batch_bytes: bytes a request, at most; a larger image goes alone.
            transport: what carries the requests, in place of the one that the URL names.

        Raises:
            ValueError: The URL or a number makes no sense.
            ModuleNotFoundError: An HTTP URL, without the extra `http`.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s: expected more than 0 s, or None, came {timeout_s}")
        if batch_size < 1 or max_in_flight < 1 or not 1 <= max_batch_bytes <= MAX_REQUEST_BYTES:
            raise ValueError(
                "expected batch_size >= 1, max_in_flight >= 1 and max_batch_bytes from 1 byte to 1 GiB, "
                f"came {batch_size}, {max_in_flight} and {max_batch_bytes}"
            )
        target = parse_url(url, backend=backend)
        self.url = target.url
        self.model = model
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._max_in_flight = max_in_flight
        self._max_batch_bytes = max_batch_bytes
        self._transport: TransportT = transport or self._open(target, model)
        self._is_closed = False

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of the server that INFERENCE_SERVICE_URL names, with the constructor's other options.

        INFERENCE_BACKEND=pytorch says that it is the PyTorch service; without it, or with `triton`, it is Triton.

        Raises:
            ValueError: The first variable is not set, or the two do not name a server.
        """
        url = os.environ.get(URL_VARIABLE)
        if not url:
            raise ValueError(f"{URL_VARIABLE} is not set; for example {URL_VARIABLE}={DEFAULT_URL}")
        options.setdefault("backend", os.environ.get(BACKEND_VARIABLE) or "triton")
        try:
            parse_url(url, backend=options["backend"])
        except ValueError as error:
            raise ValueError(f"{URL_VARIABLE}, {BACKEND_VARIABLE}: {error}") from error
        return cls(url, **options)

    @staticmethod
    def _open(target: Target, model: str) -> TransportT:
        raise NotImplementedError

    def _batches(self, images: Iterable[ImageSource], *, keep_going: bool) -> Batches:
        require_many(images)
        if self._is_closed:
            raise RuntimeError("this client is closed")
        return Batches(
            images,
            batch_size=self._batch_size,
            max_batch_bytes=self._max_batch_bytes,
            read_ahead=4 * self._max_in_flight * self._batch_size,  # so that one slow request does not idle the others
            keep_going=keep_going,
        )

    def _countdown(self) -> Callable[[], float | None]:
        """A function that gives the seconds left of timeout_s from now on, and raises when none are."""
        if (timeout_s := self._timeout_s) is None:
            return lambda: None
        ends_s = time.monotonic() + timeout_s

        def time_left_s() -> float:
            if (left_s := ends_s - time.monotonic()) > 0:
                return left_s
            raise DeadlineExceededError(f"not all answers came within {timeout_s} s; {DeadlineExceededError.advice}")

        return time_left_s
