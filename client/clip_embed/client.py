"""The blocking client."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, as_completed, wait
from typing import Any, Self, cast

import numpy as np

from clip_embed.batches import ImageSource, text_bytes
from clip_embed.credentials import Credentials
from clip_embed.dispatch import Attempt, Dispatch, Probe
from clip_embed.errors import ContractError, CredentialsError, EmbeddingError
from clip_embed.options import ClientOptions
from clip_embed.served import Served
from clip_embed.target import Target
from clip_embed.transport import Transport, open_transport
from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class EmbeddingClient(ClientOptions[Transport]):
    """Embeds images and texts on a server. Thread-safe: one client, and so one connection, serves a whole process.

    In a process that is forked it connects anew. It cannot be pickled.
    """

    def embed(self, images: Iterable[ImageSource]) -> Embeddings:
        """The embeddings of N images: (N, D) float32, C-contiguous, row i of image i, L2 norm 1.

        An image is an encoded file's bytes, its path, the open file, or pixels: an image of Pillow or a (H, W, 3) uint8
        array. Pixels are sent as PNG, which loses nothing and costs more than the file: see `ImageSource`.

        Raises:
            InvalidImageError: Bad images, named by index and path: those of the request that failed first.
                `embed_many` finds every one.
            EmbeddingError: What else kept the embeddings away; see `clip_embed.errors`. The call's other requests are
                cancelled. A `retryable` one is the last attempt's: there was no time for another.
            TypeError: One image in place of a sequence, or something that `ImageSource` does not name.
        """
        return stack(list(self._results(self._dispatch(images, keep_going=False))))

    def embed_many(self, images: Iterable[ImageSource]) -> Iterator[Embeddings | EmbeddingError]:
        """For each image in order its embedding, (D,) float32 of L2 norm 1, or the error that kept it away.

        For any number of images: they are read as they are needed, a bounded number ahead of the results. A bad image
        costs its request one more round trip and the other images nothing; its error is an InvalidImageError with one
        failure. An error of another kind is given for each image of the request that met it, and the rest goes on; stop
        at the first if the server is gone. `timeout_s` is each request's deadline, its attempts and waits included.

        Raises:
            TypeError: One image in place of a sequence, or something that `ImageSource` does not name.
        """
        return self._results(self._dispatch(images, keep_going=True))

    def embed_text(self, texts: Iterable[str]) -> Embeddings:
        """The embeddings of N texts: (N, D) float32, C-contiguous, row i of text i, L2 norm 1, comparable with images'.

        A text is cut where the model's context ends, as open_clip cuts it; the empty text has an embedding too.

        Raises:
            InvalidTextError: Bad texts, named by index: over 64 KiB, or no Unicode.
            EmbeddingError: As `embed`; ModelNotReadyError where the server has no text tower.
            TypeError: One text in place of a sequence, or something that is no text.
        """
        client = self._of_texts()
        return stack(list(client._results(client._dispatch(text_bytes(texts), keep_going=False))))

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server answers and its model is loaded; False also when nothing listens or time runs out."""
        if self._is_closed:
            return False
        answers = [transport.is_ready(timeout_s) for transport in self._servers.transports]
        try:
            return any(_is_yes(answer) for answer in as_completed(answers))
        finally:
            for answer in answers:
                answer.cancel()

    def served(self, *, timeout_s: float = 5.0) -> Served:
        """What the server says of itself: of which weights its vectors are, and which files it takes.

        Raises:
            ContractError: Several servers say that they serve different weights.
            EmbeddingError: None answered.
        """
        self._raise_if_closed()
        said: dict[str, Served] = {}
        unanswered: EmbeddingError | None = None
        for target, transport in zip(self._targets, self._servers.transports, strict=True):
            try:
                said[target.url] = transport.served(timeout_s).result()
            except (CredentialsError, ContractError):  # it is closed to this client, or of an earlier version
                said[target.url] = Served()
            except EmbeddingError as error:
                unanswered = error
        if unanswered and not said:
            raise unanswered
        if len({one.provenance for one in said.values()}) > 1:
            each = "; ".join(f"{url}: {one.provenance or 'it does not say'}" for url, one in said.items())
            raise ContractError(f"expected servers of the same weights, got {each}")
        return next(iter(said.values()))

    def close(self) -> None:
        """Drops the connections. Calls that are under way fail."""
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
    def _open(target: Target, model: str, credentials: Credentials) -> Transport:
        return open_transport(target, model, credentials)

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
                    self._raise_if_closed()  # which ends the requests with errors that are not the server's
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
            self._raise_if_closed()  # a transport that was closed meanwhile raises what it likes
            raise

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _is_yes(answer: Future[bool]) -> bool:
    try:
        return answer.result()
    except (EmbeddingError, CancelledError):
        return False


def stack(rows: list[Embeddings | EmbeddingError]) -> Embeddings:
    """(N, D) of N rows, (0, 512) of none; the errors of a call that does not keep going were raised: there are none."""
    return np.stack(cast("list[Embeddings]", rows)) if rows else np.empty((0, EMBEDDING_SIZE), np.float32)
