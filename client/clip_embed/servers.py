"""The servers of a client: who gets the next request, and who gets none until a probe finds it well.

A server that cannot be reached, or whose model is not ready, is set aside for a time that grows with each failure in a
row, as Envoy's outlier detection does it; then it is asked whether it is ready, and only a yes brings it back.
https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/outlier
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from clip_embed.errors import DeadlineExceededError, EmbeddingError, ModelNotReadyError, ServerUnavailableError
from clip_embed.retry import Retry
from clip_embed.transport import AsyncTransport, Transport

TransportT = TypeVar("TransportT", Transport, AsyncTransport)

SLOW_ANSWERS = 3  # deadlines in a row after which another server is preferred; not measured

_log = logging.getLogger("clip_embed")
IS_BACK = "%s is ready again"
"""What is logged of a server, by its URL, that was lost and answers again; it may be another one."""
_log.addHandler(logging.NullHandler())  # silent unless the application listens


@dataclass(eq=False, slots=True)
class Server(Generic[TransportT]):
    """One server and what is known of it. Only `Servers` changes it."""

    url: str
    transport: TransportT
    in_flight: int = 0
    last_taken: int = 0
    failures: int = 0  # how often it was set aside or probed in vain since its last answer
    deadlines: int = 0  # how many requests in a row it let run out of time
    aside_until_s: float | None = None  # when it may be probed; None: it is well
    is_probed: bool = False
    error: EmbeddingError | None = None  # why it was set aside


class Servers(Generic[TransportT]):
    """Thread-safe: the calls of a client share it. `now_s` is the time of one monotonic clock."""

    def __init__(self, servers: Sequence[Server[TransportT]], retry: Retry | None) -> None:
        self._servers: tuple[Server[TransportT], ...] = tuple(servers)
        self._retry = retry
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def transports(self) -> tuple[TransportT, ...]:
        return tuple(server.transport for server in self._servers)

    def take(self, *, rather_not: Server[TransportT] | None = None) -> Server[TransportT] | None:
        """The server that gets a request now: the well one with the fewest on their way, each in turn among equals.

        None when none is well; without retries there is always one, for then nothing may wait. Every server that was
        taken is given back by `release` or `settle`.

        Args:
            rather_not: the server that could not answer this request before.
        """
        with self._lock:
            candidates = [server for server in self._servers if server.aside_until_s is None]
            if not candidates and self._retry is None:
                candidates = list(self._servers)
            if not candidates:
                return None
            server = min(candidates, key=lambda one: (one is rather_not, one.in_flight, one.last_taken))
            self._taken += 1
            server.last_taken = self._taken
            server.in_flight += 1
            return server

    def release(self, server: Server[TransportT]) -> None:
        """Takes in that a request ended in a way that says nothing about its server."""
        with self._lock:
            server.in_flight -= 1

    def settle(self, server: Server[TransportT], error: EmbeddingError | None, now_s: float) -> None:
        """Takes in how a request ended: an error that only the server can be blamed for sets it aside."""
        with self._lock:
            server.in_flight -= 1
            if server.aside_until_s is not None:
                return  # it was sent before, and tells nothing new
            if isinstance(error, ServerUnavailableError | ModelNotReadyError):
                self._set_aside(server, error, now_s)
            elif isinstance(error, DeadlineExceededError):
                server.deadlines += 1
                others = any(other.aside_until_s is None for other in self._servers if other is not server)
                if server.deadlines >= SLOW_ANSWERS and others:  # the last one is better slow than not at all
                    self._set_aside(server, error, now_s)
            else:
                server.failures = server.deadlines = 0

    def next_probe(self, now_s: float) -> Server[TransportT] | None:
        """A server that is to be asked now whether it is ready; `settle_probe` takes in what it says."""
        with self._lock:
            for server in self._servers:
                if server.aside_until_s is not None and server.aside_until_s <= now_s and not server.is_probed:
                    server.is_probed = True
                    return server
            return None

    def settle_probe(self, server: Server[TransportT], is_ready: bool | None, now_s: float) -> None:
        """Takes in what a probe said; None: it was given up."""
        with self._lock:
            server.is_probed = False
            if is_ready:
                server.aside_until_s = None
                server.deadlines = 0
                _log.info(IS_BACK, server.url)
            elif is_ready is not None:
                self._wait(server, now_s)

    def next_probe_s(self) -> float | None:
        """When the next server may be probed; None when none waits for that."""
        with self._lock:
            times_s = [one.aside_until_s for one in self._servers if not one.is_probed]
            return min((time_s for time_s in times_s if time_s is not None), default=None)

    def why_none(self) -> str | None:
        """Why no server is well; None when one is."""
        with self._lock:
            if any(server.aside_until_s is None for server in self._servers):
                return None
            return "; ".join(str(server.error) for server in self._servers)

    def _set_aside(self, server: Server[TransportT], error: EmbeddingError, now_s: float) -> None:
        server.error = error
        self._wait(server, now_s)
        if self._retry is not None:
            _log.warning("%s gets no requests until it is ready again: %s", server.url, error)

    def _wait(self, server: Server[TransportT], now_s: float) -> None:
        server.failures += 1
        server.aside_until_s = now_s + (self._retry.wait_s(server.failures) if self._retry else 0.0)
