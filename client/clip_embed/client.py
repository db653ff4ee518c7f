"""The blocking client."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Self, cast

import numpy as np

from clip_embed.batches import Batches, ImageSource, Request
from clip_embed.errors import EmbeddingError
from clip_embed.options import ClientOptions
from clip_embed.transport import Target, Transport, open_transport
from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class EmbeddingClient(ClientOptions[Transport]):
    """Embeds images on a server. Thread-safe: one client, and so one connection, serves a whole process."""

    def embed(self, images: Iterable[ImageSource]) -> Embeddings:
        """The embeddings of N images: (N, 512) float32, C-contiguous, row i of image i, L2 norm 1.

        Raises:
            InvalidImageError: Bad images, named by index and path: those of the request that failed first.
                `embed_each` finds every one.
            EmbeddingError: What else kept the embeddings away; see `clip_embed.errors`. The call's other requests are
                cancelled.
            TypeError: One image in place of a sequence, or something that is neither bytes nor a path.
        """
        batches = self._batches(images, keep_going=False)
        return stack(list(self._results(batches, self._countdown())))

    def embed_each(self, images: Iterable[ImageSource]) -> Iterator[Embeddings | EmbeddingError]:
        """For each image in order its embedding, (512,) float32 of L2 norm 1, or the error that kept it away.

        For any number of images: they are read as they are needed, a bounded number ahead of the results. A bad image
        costs its request one more round trip and the other images nothing; its error is an InvalidImageError with one
        failure. An error of another kind is given for each image of the request that met it, and the rest goes on; stop
        at the first if the server is gone. `timeout_s` is each request's deadline.

        Raises:
            TypeError: One image in place of a sequence, or something that is neither bytes nor a path.
        """
        return self._results(self._batches(images, keep_going=True), lambda: self._timeout_s)

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and its model is loaded; False also when nothing listens or time runs out."""
        if self._is_closed:
            return False
        try:
            return self._transport.is_ready(timeout_s)
        except EmbeddingError:
            return False

    def close(self) -> None:
        """Drops the connection. Calls that are under way fail."""
        if not self._is_closed:
            self._is_closed = True
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _open(target: Target, model: str) -> Transport:
        return open_transport(target, model)

    def _results(
        self, batches: Batches, time_left_s: Callable[[], float | None]
    ) -> Iterator[Embeddings | EmbeddingError]:
        in_flight: dict[Future[Embeddings], Request] = {}
        try:
            while not batches.finished:
                while len(in_flight) < self._max_in_flight and (request := batches.next_request()):
                    answer = self._transport.send([item.image for item in request], time_left_s())
                    in_flight[answer] = request
                for answer in wait(in_flight, return_when=FIRST_COMPLETED).done if in_flight else ():
                    batches.settle(in_flight.pop(answer), answer.result)
                yield from batches.ready()
        finally:
            for answer in in_flight:
                answer.cancel()


def stack(rows: list[Embeddings | EmbeddingError]) -> Embeddings:
    """(N, 512) of N rows; the errors of a call that does not keep going were raised, so none is among them."""
    return np.stack(cast("list[Embeddings]", rows)) if rows else np.empty((0, EMBEDDING_SIZE), np.float32)
