"""The blocking client."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, as_completed, wait
from typing import Any, Self, cast

import numpy as np

from clip_embed.batches import ImageSource, text_bytes
from clip_embed.credentials import Credentials
from clip_embed.dispatch import Attempt, Dispatch, Probe
from clip_embed.endpoint import Endpoint
from clip_embed.errors import ContractError, CredentialsError, EmbeddingError
from clip_embed.options import ClientOptions
from clip_embed.server_info import ServerInfo
from clip_embed.transport import Transport, open_transport
from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class EmbeddingClient(ClientOptions[Transport]):
    """Embeds images and texts on a server. Thread-safe: one client, with one connection, is enough for a process.

    A forked process reconnects. The client cannot be pickled.
    """

    def embed(self, images: Iterable[ImageSource]) -> Embeddings:
        """The embeddings of N images: (N, D) float32, C-contiguous, row i of image i, L2 norm 1.

        An image is an encoded file's bytes, its path, the open file, or pixels: a Pillow image or a (H, W, 3) uint8
        array. Pixels are sent as PNG, which is lossless but costs more than the file: see `ImageSource`.

        Raises:
            InvalidImageError: Lists, by index and path, the bad images of the first request that failed; `embed_many`
                finds all.
            EmbeddingError: Any other failure; see `clip_embed.errors`. The call's other requests are cancelled. A
                `retryable` error is that of the last attempt, when the time was up.
            TypeError: One image in place of a sequence, or something that is not an `ImageSource`.
        """
        return stack(list(self._results(self._dispatch(images, keep_going=False))))

    def embed_many(self, images: Iterable[ImageSource]) -> Iterator[Embeddings | EmbeddingError]:
        """Yields for each image in order its embedding, (D,) float32 of L2 norm 1, or its error.

        Works for any number of images: it reads only a bounded number ahead of the results. A bad image gets an
        InvalidImageError with one failure; the other images of its request are sent again. Any other error is yielded
        for each image of the failed request, and the rest continues; stop at the first one if the server is lost.
        `timeout_s` is the deadline of each request, with all attempts and waits.

        Raises:
            TypeError: One image in place of a sequence, or something that is not an `ImageSource`.
        """
        return self._results(self._dispatch(images, keep_going=True))

    def embed_text(self, texts: Iterable[str]) -> Embeddings:
        """The embeddings of N texts: (N, D) float32, C-contiguous, row i of text i, L2 norm 1, in the images' space.

        A text is truncated to the model's context as in open_clip. The empty text has an embedding too.

        Raises:
            InvalidTextError: Some texts are over 64 KiB or not Unicode. Names them by index.
            EmbeddingError: As in `embed`; ModelNotReadyError if the server has no text tower.
            TypeError: One text in place of a sequence, or something that is not a text.
        """
        client = self._text_client()
        return stack(list(client._results(client._dispatch(text_bytes(texts), keep_going=False))))

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server answers and its model is loaded. False if nothing listens or the time is up."""
        if self._is_closed:
            return False
        answers = [transport.is_ready(timeout_s) for transport in self._servers.transports]
        try:
            return any(_is_ready(answer) for answer in as_completed(answers))
        finally:
            for answer in answers:
                answer.cancel()

    def served(self, *, timeout_s: float = 5.0) -> ServerInfo:
        """What the server reports: the provenance of its vectors and the file suffixes that it accepts.

        Raises:
            ContractError: Several servers report different weights.
            EmbeddingError: No server answered.
        """
        self._raise_if_closed()
        infos: dict[str, ServerInfo] = {}
        unanswered: EmbeddingError | None = None
        for endpoint, transport in zip(self._endpoints, self._servers.transports, strict=True):
            try:
                infos[endpoint.url] = transport.server_info(timeout_s).result()
            except (CredentialsError, ContractError):  # it restricts this call, or is of an earlier version
                infos[endpoint.url] = ServerInfo()
            except EmbeddingError as error:
                unanswered = error
        if unanswered and not infos:
            raise unanswered
        if len({one.provenance for one in infos.values()}) > 1:
            each = "; ".join(f"{url}: {one.provenance or 'does not say'}" for url, one in infos.items())
            raise ContractError(f"expected servers of the same weights, got {each}")
        return next(iter(infos.values()))

    def close(self) -> None:
        """Close the connections. Calls in progress fail."""
        if not self._is_closed:
            self._is_closed = True
            for transport in self._servers.transports:
                transport.close()
            if self._texts:
                self._texts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _open(endpoint: Endpoint, model: str, credentials: Credentials) -> Transport:
        return open_transport(endpoint, model, credentials)

    def _results(self, dispatch: Dispatch[Transport]) -> Iterator[Embeddings | EmbeddingError]:
        started: dict[Future[Any], Attempt[Transport] | Probe[Transport]] = {}
        try:
            while not dispatch.finished:
                while True:
                    dispatch.read()
                    if (job := dispatch.next()) is None:
                        break
                    started[self._start(dispatch, job)] = job
                pause_s = dispatch.pause_s()
                if started:
                    done = wait(started, pause_s, FIRST_COMPLETED).done
                    self._raise_if_closed()  # closing fails the requests with errors that are not the server's
                    for answer in done:
                        dispatch.settle(started.pop(answer), answer.result)
                elif pause_s:
                    self._sleep(pause_s)
                    self._raise_if_closed()
                yield from dispatch.ready()
        finally:
            for answer, job in started.items():
                answer.cancel()
                dispatch.abandon(job)

    def _start(self, dispatch: Dispatch[Transport], job: Attempt[Transport] | Probe[Transport]) -> Future[Any]:
        try:
            if isinstance(job, Probe):
                return job.server.transport.is_ready(job.timeout_s)
            return job.server.transport.send(job.images, job.timeout_s)
        except BaseException:
            dispatch.abandon(job)
            self._raise_if_closed()  # a closed transport may raise anything
            raise

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _is_ready(answer: Future[bool]) -> bool:
    try:
        return answer.result()
    except (EmbeddingError, CancelledError):
        return False


def stack(rows: list[Embeddings | EmbeddingError]) -> Embeddings:
    """The (N, D) array of N rows, (0, 512) of none. The rows contain no errors: without keep_going they were raised."""
    return np.stack(cast("list[Embeddings]", rows)) if rows else np.empty((0, EMBEDDING_SIZE), np.float32)
