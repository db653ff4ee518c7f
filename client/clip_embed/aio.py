"""The asyncio client."""

import asyncio
from collections.abc import Iterable
from typing import Self

from clip_embed.batches import ImageSource, Request
from clip_embed.client import stack
from clip_embed.errors import EmbeddingError
from clip_embed.options import ClientOptions
from clip_embed.transport import AsyncTransport, Target, open_async_transport
from clip_embed.wire import Embeddings


class AsyncEmbeddingClient(ClientOptions[AsyncTransport]):
    """Embeds images on a server, for any number of tasks of one event loop. Files are read in a thread."""

    async def embed(self, images: Iterable[ImageSource]) -> Embeddings:
        """The embeddings of N images: (N, 512) float32, C-contiguous, row i of image i, L2 norm 1.

        Raises:
            InvalidImageError: Bad images, named by index and path: those of the request that failed first.
            EmbeddingError: What else kept the embeddings away; see `clip_embed.errors`. The call's other requests are
                cancelled, as they all are when this call is.
            TypeError: One image in place of a sequence, or something that is neither bytes nor a path.
        """
        batches, time_left_s = self._batches(images, keep_going=False), self._countdown()
        in_flight: dict[asyncio.Task[Embeddings], Request] = {}
        rows: list[Embeddings | EmbeddingError] = []
        try:
            while not batches.finished:
                while len(in_flight) < self._max_in_flight and (
                    request := await asyncio.to_thread(batches.next_request)
                ):
                    sending = self._transport.send([item.image for item in request], time_left_s())
                    in_flight[asyncio.create_task(sending)] = request
                done = (await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED))[0] if in_flight else ()
                for answer in done:
                    batches.settle(in_flight.pop(answer), answer.result)
                rows.extend(batches.ready())
        finally:
            for answer in in_flight:
                answer.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        return stack(rows)

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and its model is loaded; False also when nothing listens or time runs out."""
        if self._is_closed:
            return False
        try:
            return await self._transport.is_ready(timeout_s)
        except EmbeddingError:
            return False

    async def close(self) -> None:
        """Drops the connection. Calls that are under way fail."""
        if not self._is_closed:
            self._is_closed = True
            await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @staticmethod
    def _open(target: Target, model: str) -> AsyncTransport:
        return open_async_transport(target, model)
