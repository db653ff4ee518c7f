"""The asyncio client."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Self

from clip_embed.batches import ImageSource, text_bytes
from clip_embed.client import stack
from clip_embed.credentials import Credentials
from clip_embed.dispatch import Attempt, Dispatch, Probe
from clip_embed.endpoint import Endpoint
from clip_embed.errors import EmbeddingError
from clip_embed.options import ClientOptions
from clip_embed.servers import Servers
from clip_embed.transport import AsyncTransport, open_async_transport
from clip_embed.wire import Embeddings


class AsyncEmbeddingClient(ClientOptions[AsyncTransport]):
    """Embeds images and texts on a server, for any number of tasks in one event loop. A thread reads the files.

    After that loop is closed, as at the end of `asyncio.run`, another loop may use the client, which then reconnects.
    """

    _loop: asyncio.AbstractEventLoop | None = None

    async def embed(self, images: Iterable[ImageSource]) -> Embeddings:
        """The embeddings of N images: (N, D) float32, C-contiguous, row i of image i, L2 norm 1.

        Raises:
            InvalidImageError: Some images are bad. Names those of the request that failed first by index and path.
            EmbeddingError: Any other failure; see `clip_embed.errors`. The call's other requests are cancelled. If it
                is `retryable`, it is the error of the last attempt. Cancelling the call cancels all of its requests.
            TypeError: One image in place of a sequence, or something that is not an `ImageSource`.
        """
        dispatch = self._dispatch(images, keep_going=False)
        return stack([row async for row in self._results(dispatch)])

    def embed_many(self, images: Iterable[ImageSource]) -> AsyncIterator[Embeddings | EmbeddingError]:
        """`EmbeddingClient.embed_many` for `async for`. A thread iterates over the images."""
        return self._results(self._dispatch(images, keep_going=True))

    async def embed_text(self, texts: Iterable[str]) -> Embeddings:
        """`EmbeddingClient.embed_text` to await."""
        client = self._text_client()
        dispatch = client._dispatch(text_bytes(texts), keep_going=False)
        return stack([row async for row in client._results(dispatch)])

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server answers and its model is loaded. False if nothing listens or the time is up."""
        if self._is_closed:
            return False
        answers = [asyncio.create_task(_is_ready(transport, timeout_s)) for transport in self._servers.transports]
        try:
            for answer in asyncio.as_completed(answers):
                if await answer:
                    return True
            return False
        finally:
            await _cancel(answers)

    async def close(self) -> None:
        """Close the connections. Calls in progress fail."""
        if not self._is_closed:
            self._is_closed = True
            for transport in self._servers.transports:
                await transport.close()
            if self._texts:
                await self._texts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _servers(self) -> Servers[AsyncTransport]:
        """The servers, reopened for a new event loop. Raises RuntimeError without a loop, and for a second one."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                if not (self._loop.is_closed() or self._is_forked):
                    raise RuntimeError("this client belongs to another event loop: create one for each")
                self._reopen()
            self._loop = loop
        return self._opened[-1]

    @staticmethod
    def _open(endpoint: Endpoint, model: str, credentials: Credentials) -> AsyncTransport:
        return open_async_transport(endpoint, model, credentials)

    async def _results(self, dispatch: Dispatch[AsyncTransport]) -> AsyncIterator[Embeddings | EmbeddingError]:
        started: dict[asyncio.Task[Any], Attempt[AsyncTransport] | Probe[AsyncTransport]] = {}
        try:
            while not dispatch.finished:
                while True:
                    if dispatch.has_room:
                        await asyncio.to_thread(dispatch.read)
                    if (job := dispatch.next()) is None:
                        break
                    started[asyncio.create_task(_start(job))] = job
                pause_s = dispatch.pause_s()
                if started:
                    done, _ = await asyncio.wait(started, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                    self._raise_if_closed()  # closing fails the requests with errors that are not the server's
                    for answer in done:
                        dispatch.settle(started.pop(answer), answer.result)
                elif pause_s:
                    await asyncio.sleep(pause_s)
                    self._raise_if_closed()
                for result in dispatch.ready():
                    yield result
        finally:
            for job in started.values():
                dispatch.abandon(job)
            await _cancel(started)


async def _start(job: Attempt[AsyncTransport] | Probe[AsyncTransport]) -> Embeddings | bool:
    if isinstance(job, Probe):
        return await job.server.transport.is_ready(job.timeout_s)
    return await job.server.transport.send(job.images, job.timeout_s)


async def _is_ready(transport: AsyncTransport, timeout_s: float) -> bool:
    try:
        return await transport.is_ready(timeout_s)
    except EmbeddingError:
        return False


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
