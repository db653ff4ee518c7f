"""The mixed traffic of a soak: good images, broken ones and misbehaving clients, each with its expected answer.

Every call of a client is one of `REQUESTS` or `BAD_REQUESTS`. The soak reports calls that end in any other way.
"""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from clip_embed import EmbeddingClient, errors
from clip_embed.wire import DEFAULT_MODEL, INPUT

# Alone and in a batch an image's FP32 vector differs in its last bits, in BF16 by up to 0.001: served rightly, it is
# far closer to itself than to any other photograph (0.79 for two of the most alike).
SAME_IMAGE_COSINE = 0.99
TIMEOUT_S = 120.0  # of a call with all its attempts: a request that takes longer is lost
_IMPATIENT_S = 0.002


class Ended(NamedTuple):
    """A call that ended: which, when (seconds of the soak), its images, and what was wrong about it: "" for nothing.

    `lost` images should have become a vector or a named error and did not.
    """

    kind: str
    at_s: float
    latency_ms: float
    images: int
    lost: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Photographs:
    """Good images (encoded), and the server's embeddings of them at the start, one at a time: (N, 512) float32."""

    images: Sequence[bytes]
    embeddings: npt.NDArray[np.float32]

    def bad(self) -> tuple[bytes, ...]:
        """Files that a server must refuse: empty, text, and a photograph cut, scrambled or without its header."""
        whole = self.images[0]
        return b"", b"not an image", whole[: len(whole) // 2], whole[:200] + bytes(len(whole) - 200), whole[2:]


class Caller:
    """One client of the soak, with a connection and a random generator."""

    def __init__(self, url: str, photographs: Photographs, seed: int) -> None:
        self.url, self.photographs = url, photographs
        self.dice = random.Random(seed)  # noqa: S311
        self.client = EmbeddingClient(url, timeout_s=TIMEOUT_S)
        self.bad_images = photographs.bad()

    def choose(self, count: int) -> list[int]:
        """The indices of some photographs."""
        return [self.dice.randrange(len(self.photographs.images)) for _ in range(count)]

    def check(self, indices: Sequence[int], embeddings: Sequence[Any]) -> tuple[int, str]:
        """How many of these photographs' embeddings are missing or another's, and one of the reasons."""
        wrong, why = 0, ""
        for index, embedding in zip(indices, embeddings, strict=True):
            if isinstance(embedding, errors.EmbeddingError):
                wrong, why = wrong + 1, f"a good image: {type(embedding).__name__}: {embedding}"
            elif (cosine := float(embedding @ self.photographs.embeddings[index])) < SAME_IMAGE_COSINE:
                wrong, why = wrong + 1, f"a good image has another's vector: cosine {cosine:.3f} to its own"
        return wrong, why


Verdict = tuple[int, int, str]
"""Images sent, images lost, and what was wrong."""


def _few(caller: Caller) -> Verdict:
    """One to four photographs in a request."""
    return _good(caller, caller.dice.randint(1, 4))


def _full_batch(caller: Caller) -> Verdict:
    """As many as a request may have."""
    return _good(caller, 64)


def _good(caller: Caller, count: int) -> Verdict:
    indices = caller.choose(count)
    images = [caller.photographs.images[index] for index in indices]
    return count, *caller.check(indices, list(caller.client.embed_many(images)))


def _broken(caller: Caller) -> Verdict:
    """A bad file between two good ones: two vectors and one error that names it."""
    indices = caller.choose(2)
    first, last = (caller.photographs.images[index] for index in indices)
    got = list(caller.client.embed_many([first, caller.dice.choice(caller.bad_images), last]))
    lost, why = caller.check(indices, [got[0], got[2]])
    if not isinstance(got[1], errors.InvalidImageError):
        return 3, lost + 1, f"a bad image: expected InvalidImageError, came {_name(got[1])}"
    return 3, lost, why


def _too_many(caller: Caller) -> Verdict:
    """One image more than a request may have."""
    with EmbeddingClient(caller.url, batch_size=65, timeout_s=TIMEOUT_S) as client:
        images = [caller.photographs.images[0]] * 65
        return _expect(errors.RequestTooLargeError, 65, lambda: client.embed(images))


def _wrong_shape(caller: Caller) -> Verdict:
    """A tensor that the model does not take."""
    tensor = InferInput(INPUT, [1, 2], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a", b"b"]], dtype=np.object_))

    def ask() -> None:
        try:
            with InferenceServerClient(caller.url.removeprefix("grpc://")) as client:
                client.infer(DEFAULT_MODEL, [tensor], client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            status = str(error.status()).removeprefix("StatusCode.")
            raise errors.error_from_grpc(status, error.message(), url=caller.url) from error

    return _expect(errors.ContractError, 1, ask)


def _impatient(caller: Caller) -> Verdict:
    """A request whose client gives up before the answer can arrive."""
    with EmbeddingClient(caller.url, timeout_s=_IMPATIENT_S, retry=None) as client:
        return _expect(errors.DeadlineExceededError, 1, lambda: client.embed(caller.photographs.images[:1]))


def _gone(caller: Caller) -> Verdict:
    """A connection that is reset in the middle of a message."""
    host, port = caller.url.removeprefix("grpc://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + caller.dice.randbytes(100))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a farewell
    return 0, 0, ""


def _expect(kind: type[errors.EmbeddingError], images: int, ask: Callable[[], object]) -> Verdict:
    try:
        came: object = ask()
    except errors.EmbeddingError as error:
        came = error
    right = isinstance(came, kind)
    return images, 0 if right else images, "" if right else f"expected {kind.__name__}, came {_name(came)}"


def _name(came: object) -> str:
    return f"{type(came).__name__}: {came}" if isinstance(came, Exception) else "an answer"


Request = Callable[[Caller], Verdict]
REQUESTS: dict[str, tuple[Request, float]] = {
    "few": (_few, 0.99),
    "full_batch": (_full_batch, 0.01),
}
BAD_REQUESTS: dict[str, tuple[Request, float]] = {
    "broken": (_broken, 0.5),
    "too_many": (_too_many, 0.05),
    "wrong_shape": (_wrong_shape, 0.15),
    "impatient": (_impatient, 0.15),
    "gone": (_gone, 0.15),
}
"""What is sent, and how often among the good or among the bad. The shares are chosen, not measured."""


class Traffic:
    """Callers in threads, until `stop`. `ended` grows by every call."""

    def __init__(self, url: str, photographs: Photographs, *, clients: int, bad_share: float, seed: int) -> None:
        self.ended: list[Ended] = []
        self._bad_share = bad_share
        self._stop = threading.Event()
        self._began_s = time.monotonic()
        every_kind = iter([*REQUESTS, *BAD_REQUESTS])  # the callers share them out, so that a short soak has them all
        self._threads = [
            threading.Thread(target=self._call, args=(Caller(url, photographs, seed + number), every_kind), daemon=True)
            for number in range(clients)
        ]

    def start(self) -> None:
        """Start the callers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """Wait for the requests in flight; returns the number of callers that hang."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT_S)
        return sum(thread.is_alive() for thread in self._threads)

    def _call(self, caller: Caller, first: Iterator[str]) -> None:
        with caller.client:
            while not self._stop.is_set():
                kind = next(first, None) or self._roll(caller)
                ask = (REQUESTS | BAD_REQUESTS)[kind][0]
                begin_s = time.monotonic()
                try:
                    images, lost, problem = ask(caller)
                except Exception as error:  # the soak reports it
                    images, lost, problem = 1, 1, f"{type(error).__name__}: {error}"
                end_s = time.monotonic()
                latency_ms = 1000 * (end_s - begin_s)
                self.ended.append(Ended(kind, end_s - self._began_s, latency_ms, images, lost, problem))

    def _roll(self, caller: Caller) -> str:
        kinds = BAD_REQUESTS if caller.dice.random() < self._bad_share else REQUESTS
        return caller.dice.choices(list(kinds), [share for _, share in kinds.values()])[0]
