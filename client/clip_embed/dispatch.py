"""Decides which request of a call goes next, to which server, and which is sent again and when.

The blocking and the async client share it. It neither waits nor sends: they do both.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Generic

from clip_embed.batches import Batches, Request
from clip_embed.errors import (
    DeadlineExceededError,
    EmbeddingError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from clip_embed.retry import Retry
from clip_embed.servers import Server, Servers, TransportT
from clip_embed.wire import Embeddings, ImageBytes

PROBE_TIMEOUT_S = 5.0
_LONGEST_PAUSE_S = 0.1  # how soon a call sees that a server changed or the client was closed


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits on a call's requests. Times are in seconds; None means no limit.

    Args:
        max_in_flight: requests that are in flight or wait to be sent again.
        timeout_s: the deadline of the call or of each request, with all attempts and waits.
        is_per_request: whether timeout_s is for each request.
        attempt_timeout_s: the deadline of one attempt.
    """

    max_in_flight: int
    timeout_s: float | None
    is_per_request: bool
    attempt_timeout_s: float | None = None


@dataclass(eq=False, slots=True)
class Pending(Generic[TransportT]):
    """A request without a result. It may be sent from `due_s` until `ends_s`."""

    request: Request
    ends_s: float | None
    due_s: float
    attempts: int = 0
    last_server: Server[TransportT] | None = None
    last_error: EmbeddingError | None = None


@dataclass(eq=False, slots=True)
class Attempt(Generic[TransportT]):
    """A request to send to a server now, with `timeout_s` as its deadline."""

    pending: Pending[TransportT]
    server: Server[TransportT]
    timeout_s: float | None

    @property
    def images(self) -> list[ImageBytes]:
        """The images to send."""
        return [item.image for item in self.pending.request]


@dataclass(eq=False, slots=True)
class Probe(Generic[TransportT]):
    """A server to ask whether it is ready."""

    server: Server[TransportT]
    timeout_s: float = PROBE_TIMEOUT_S


class Dispatch(Generic[TransportT]):
    """Turns a call's batches into attempts, and the answers into one result for each request.

    Args:
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        batches: Batches,
        servers: Servers[TransportT],
        limits: RequestLimits,
        retry: Retry | None,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self._batches = batches
        self._servers: Servers[TransportT] = servers
        self._limits = limits
        self._retry = retry
        self._now_s = now_s
        self._ends_s = None if limits.is_per_request else self._deadline_s()
        self._waiting: list[Pending[TransportT]] = []
        self._in_flight = 0

    @property
    def finished(self) -> bool:
        """Whether every image was read and every result yielded."""
        return self._batches.finished

    @property
    def has_room(self) -> bool:
        """Whether to read more images: no waiting request is due, and fewer than max_in_flight are unfinished."""
        now_s = self._now_s()
        return len(self._waiting) + self._in_flight < self._limits.max_in_flight and not any(
            pending.due_s <= now_s for pending in self._waiting
        )

    def read(self) -> None:
        """Read the images of one more request, if there is room for it.

        Raises:
            InvalidImageError, TypeError: As in `Batches.next_request`.
        """
        if self.has_room and (request := self._batches.next_request()):
            ends_s = self._deadline_s() if self._limits.is_per_request else self._ends_s
            self._waiting.append(Pending(request, ends_s, due_s=self._now_s()))

    def next(self) -> Attempt[TransportT] | Probe[TransportT] | None:
        """The attempt or probe to start now, or None. Pass it to `settle` or `abandon` when it ends.

        Raises:
            EmbeddingError: A request's deadline has passed, and the call does not keep going.
        """
        now_s = self._now_s()
        if server := self._servers.next_probe(now_s):
            return Probe(server)
        for late in [one for one in self._waiting if one.ends_s is not None and one.ends_s <= now_s]:
            self._waiting.remove(late)
            self._batches.fail(late.request, late.last_error or self._deadline_error())
        due = [one for one in self._waiting if one.due_s <= now_s]
        if not due:
            return None
        pending = min(due, key=lambda one: one.request[0].index)  # results are given in order
        if (server := self._servers.take(avoid=pending.last_server)) is None:
            return None
        self._waiting.remove(pending)
        self._in_flight += 1
        pending.attempts += 1
        pending.last_server = server
        left_s = None if pending.ends_s is None else pending.ends_s - now_s
        limits_s = [limit_s for limit_s in (left_s, self._limits.attempt_timeout_s) if limit_s is not None]
        return Attempt(pending, server, min(limits_s, default=None))

    def pause_s(self) -> float | None:
        """The seconds after which to call `next` again if no answer comes before; None: wait for an answer."""
        if not self._waiting and not self._in_flight:
            return 0.0
        now_s = self._now_s()
        times_s = [self._servers.next_probe_s()]
        if self._waiting:
            times_s += [now_s + _LONGEST_PAUSE_S]
            times_s += [one.due_s for one in self._waiting if one.due_s > now_s]
            times_s += [one.ends_s for one in self._waiting]
        earliest_s = min((time_s for time_s in times_s if time_s is not None), default=None)
        return None if earliest_s is None else max(0.0, earliest_s - now_s)

    def settle(self, started: Attempt[TransportT] | Probe[TransportT], answer: Callable[[], Any]) -> None:
        """Record how a job ended: `answer` returns the (n, D) embeddings or the server's readiness, or raises.

        Raises:
            EmbeddingError: The error is final, and the call does not keep going.
        """
        if isinstance(started, Probe):
            self._settle_probe(started, answer)
            return
        self._in_flight -= 1
        try:
            embeddings: Embeddings = answer()
        except EmbeddingError as error:
            self._servers.settle(started.server, error, self._now_s())
            self._fail(started.pending, error)
        except (futures.CancelledError, asyncio.CancelledError):  # by close(): a call that ends early does not get here
            self._servers.release(started.server)
            closed = ServerUnavailableError("the client was closed before the answer came")
            self._batches.fail(started.pending.request, closed)
        except BaseException:
            self._servers.release(started.server)
            raise
        else:
            self._servers.settle(started.server, None, self._now_s())
            self._batches.succeed(started.pending.request, embeddings)

    def abandon(self, started: Attempt[TransportT] | Probe[TransportT]) -> None:
        """Record that nobody waits for the job any more."""
        if isinstance(started, Probe):
            self._servers.settle_probe(started.server, None, self._now_s())
        else:
            self._in_flight -= 1
            self._servers.release(started.server)

    def ready(self) -> Iterator[Embeddings | EmbeddingError]:
        """The results that are next in order, each yielded once."""
        return self._batches.ready()

    def _fail(self, pending: Pending[TransportT], error: EmbeddingError) -> None:
        """Send the request again if that may help and there is time; otherwise its error is final."""
        error.attempts = pending.attempts
        pending.last_error = error
        pending.due_s = self._now_s()
        if self._retry and isinstance(error, ServerOverloadedError | DeadlineExceededError):
            # After other errors, the server's health decides when to retry.
            pending.due_s += self._retry.wait_s(pending.attempts)
        if self._retry and error.retryable and (pending.ends_s is None or pending.due_s < pending.ends_s):
            self._waiting.append(pending)
        else:
            self._batches.fail(pending.request, error)

    def _settle_probe(self, probe: Probe[TransportT], answer: Callable[[], bool]) -> None:
        is_ready: bool | None
        try:
            is_ready = answer()
        except EmbeddingError:
            is_ready = False
        except (futures.CancelledError, asyncio.CancelledError):
            is_ready = None
        self._servers.settle_probe(probe.server, is_ready, self._now_s())

    def _deadline_s(self) -> float | None:
        return None if self._limits.timeout_s is None else self._now_s() + self._limits.timeout_s

    def _deadline_error(self) -> EmbeddingError:
        """The error of a request whose deadline passed before its first attempt."""
        timeout_s = self._limits.timeout_s
        if why := self._servers.unhealthy_reason():
            return ServerUnavailableError(f"no server was ready within {timeout_s} s: {why}")
        return DeadlineExceededError(f"not all answers came within {timeout_s} s; {DeadlineExceededError.advice}")
