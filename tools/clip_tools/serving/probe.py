"""Probes of a server: an image and a text that it must embed, and requests that are retried while it is full."""

import re
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from io import BytesIO
from typing import TYPE_CHECKING, TypeVar

from clip_tools.errors import needs_extra
from clip_tools.proxy import DIRECT

if TYPE_CHECKING:
    from clip_embed import EmbeddingClient

PROBE_TEXT = "a photograph"
BUSY_SHARE = 0.1  # of a core: a process that decodes may wait for its turn on it
STUCK_S = 30.0  # without a batch, while the queue is full: one batch of 64 took 5 s on two busy cores
_POLL_S = 0.1
# Counts the image engine only: `preprocess` continues while the engine is stuck, and texts have their own engine.
_BATCHES = re.compile(r'^nv_inference_exec_count\{model="(?!preprocess|tokenize|clip_text).*\} (\d+)', re.MULTILINE)

AnswerT = TypeVar("AnswerT")


def probe_image() -> bytes:
    """A small valid JPEG."""
    with needs_extra("server"):
        from PIL import Image
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def retry_while_full(
    ask: Callable[[], AnswerT],
    full: tuple[type[Exception], ...],
    *,
    limit_s: float,
    before_retry: Callable[[], None] = lambda: None,
) -> AnswerT:
    """The answer of `ask`, called again for up to `limit_s` while it raises one of `full`.

    `before_retry` may raise to give up earlier.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return ask()
        except full:
            if time.monotonic() > deadline:
                raise
        before_retry()
        time.sleep(_POLL_S)


class ImageProbe:
    """Sends an image through `clip_ensemble`, and texts through the text tower if there is one.

    A busy server passes: one that is late or refuses, but embeds for others meanwhile.

    Args:
        new_client: makes a client, and so a new connection, for each probe.
        metrics_url: the server's metrics, which count what it embeds. Without them a full queue passes.
        cpu_s: the CPU time of its `preprocess` processes. While it grows, they decode an expensive image; one that
            hangs ends by itself.
        texts: what to send through the text tower.
    """

    def __init__(
        self,
        new_client: Callable[[], "EmbeddingClient"],
        image: bytes,
        metrics_url: str | None,
        cpu_s: Callable[[], float] = lambda: 0.0,
        texts: Sequence[str] = (),
    ) -> None:
        self._texts = texts
        self._new_client, self._image, self._metrics_url, self._cpu_s = new_client, image, metrics_url, cpu_s
        self._batches = self._count()
        self._seen_s, self._seen_cpu_s = time.monotonic(), cpu_s()
        self._worked_s = self._seen_s

    def __call__(self) -> str | None:
        from clip_embed import EmbeddingError

        try:
            self.ask()
        except EmbeddingError as error:
            return str(error)
        return None

    def ask(self) -> None:
        """Return if the server embeds the image and the texts, or is busy. Else raises EmbeddingError."""
        from clip_embed import DeadlineExceededError, ServerOverloadedError

        try:
            with self._new_client() as client:
                client.embed([self._image])
                if self._texts:
                    client.embed_text(self._texts)
        except ServerOverloadedError:  # refused at once: the running batch may not have ended since the last probe
            if self._idle_s() > STUCK_S and self._batches is not None:
                raise
        except DeadlineExceededError:
            if self._idle_s() > 0:
                raise
        else:
            self._idle_s()

    def _idle_s(self) -> float:
        """How long the server has embedded and decoded nothing; 0 if it has since the last call."""
        batches, now_s, cpu_s = self._count(), time.monotonic(), self._cpu_s()
        has_executed = (batches or 0) > (self._batches or 0)
        has_decoded = cpu_s - self._seen_cpu_s > BUSY_SHARE * (now_s - self._seen_s)
        if has_executed or has_decoded:
            self._worked_s = now_s
        self._batches = self._batches if batches is None else batches
        self._seen_s, self._seen_cpu_s = now_s, cpu_s
        return now_s - self._worked_s

    def _count(self) -> int | None:
        """The batches of images that the engine has executed; None without metrics."""
        if self._metrics_url is None:
            return None
        try:
            with DIRECT.open(self._metrics_url, timeout=5) as answer:
                return sum(map(int, _BATCHES.findall(answer.read().decode())))
        except (OSError, HTTPException):
            return None
