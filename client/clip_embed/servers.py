"""Chooses the server for each request, and leaves failed servers out until a probe finds them ready.

A server that cannot be reached, or whose model is not ready, is excluded for a time that grows with each failure in a
row, like in Envoy's outlier detection. Then a probe asks it whether it is ready, and it returns only if it is.
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

MOST_MISSED_DEADLINES = 3  # missed deadlines in a row after which a server is excluded; not measured

_log = logging.getLogger("clip_embed")
READY_AGAIN = "%s is ready again"
"""The log message for a server URL that answers again; it may be another server."""
_log.addHandler(logging.NullHandler())  # silent unless the application adds a handler


@dataclass(eq=False, slots=True)
class Server(Generic[TransportT]):
    """One server and its state. Only `Servers` changes it."""

    url: str
    transport: TransportT
    in_flight: int = 0
    last_taken: int = 0
    failures: int = 0  # how often it was excluded or failed a probe since its last answer
    missed_deadlines: int = 0  # how many requests in a row missed their deadline
    excluded_until_s: float | None = None  # when it may be probed; None: it is healthy
    is_probing: bool = False
    error: EmbeddingError | None = None  # why it was excluded


class Servers(Generic[TransportT]):
    """A client's servers. Thread-safe: its calls share it. `now_s` is the time of one monotonic clock."""

    def __init__(self, servers: Sequence[Server[TransportT]], retry: Retry | None) -> None:
        self._servers: tuple[Server[TransportT], ...] = tuple(servers)
        self._retry = retry
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def transports(self) -> tuple[TransportT, ...]:
        return tuple(server.transport for server in self._servers)

    def take(self, *, avoid: Server[TransportT] | None = None) -> Server[TransportT] | None:
        """The server for the next request: the healthy one with the fewest in flight, in turn among equals.

        None if none is healthy; without retries there is always one, because then no request may wait. Give every
        server back with `release` or `settle`.

        Args:
            avoid: the server that failed to answer this request before.
        """
        with self._lock:
            candidates = [server for server in self._servers if server.excluded_until_s is None]
            if not candidates and self._retry is None:
                candidates = list(self._servers)
            if not candidates:
                return None
            server = min(candidates, key=lambda one: (one is avoid, one.in_flight, one.last_taken))
            self._taken += 1
            server.last_taken = self._taken
            server.in_flight += 1
            return server

    def release(self, server: Server[TransportT]) -> None:
        """Record that a request ended in a way that says nothing about its server."""
        with self._lock:
            server.in_flight -= 1

    def settle(self, server: Server[TransportT], error: EmbeddingError | None, now_s: float) -> None:
        """Record how a request ended. An error that is the server's fault excludes it."""
        with self._lock:
            server.in_flight -= 1
            if server.excluded_until_s is not None:
                return  # the request was sent before that, so it tells nothing new
            if isinstance(error, ServerUnavailableError | ModelNotReadyError):
                self._exclude(server, error, now_s)
            elif isinstance(error, DeadlineExceededError):
                server.missed_deadlines += 1
                others = any(other.excluded_until_s is None for other in self._servers if other is not server)
                if server.missed_deadlines >= MOST_MISSED_DEADLINES and others:  # a slow server is better than none
                    self._exclude(server, error, now_s)
            else:
                server.failures = server.missed_deadlines = 0

    def next_probe(self, now_s: float) -> Server[TransportT] | None:
        """A server to ask now whether it is ready. Pass its answer to `settle_probe`."""
        with self._lock:
            for server in self._servers:
                if server.excluded_until_s is not None and server.excluded_until_s <= now_s and not server.is_probing:
                    server.is_probing = True
                    return server
            return None

    def settle_probe(self, server: Server[TransportT], is_ready: bool | None, now_s: float) -> None:
        """Record a probe's answer; None: the probe was abandoned."""
        with self._lock:
            server.is_probing = False
            if is_ready:
                server.excluded_until_s = None
                server.missed_deadlines = 0
                _log.info(READY_AGAIN, server.url)
            elif is_ready is not None:
                self._wait(server, now_s)

    def next_probe_s(self) -> float | None:
        """When the next server may be probed; None if none waits for that."""
        with self._lock:
            times_s = [one.excluded_until_s for one in self._servers if not one.is_probing]
            return min((time_s for time_s in times_s if time_s is not None), default=None)

    def unhealthy_reason(self) -> str | None:
        """Why no server is healthy; None if one is."""
        with self._lock:
            if any(server.excluded_until_s is None for server in self._servers):
                return None
            return "; ".join(str(server.error) for server in self._servers)

    def _exclude(self, server: Server[TransportT], error: EmbeddingError, now_s: float) -> None:
        server.error = error
        self._wait(server, now_s)
        if self._retry is not None:
            _log.warning("%s gets no requests until it is ready again: %s", server.url, error)

    def _wait(self, server: Server[TransportT], now_s: float) -> None:
        server.failures += 1
        server.excluded_until_s = now_s + (self._retry.wait_s(server.failures) if self._retry else 0.0)
