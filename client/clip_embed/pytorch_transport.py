"""The HTTP transport to the PyTorch service of `clip_tools.measuring.baseline`: JSON with base64.

`clip-tools bench` compares Triton with this service. INFERENCE_BACKEND=pytorch switches an application to it.
"""

import base64
import json
from collections.abc import Sequence

import httpx
import numpy as np

from clip_embed.errors import ContractError, error_from_http
from clip_embed.http_transport import AsyncHttpTransport, HttpTransport
from clip_embed.server_info import ServerInfo
from clip_embed.wire import Embeddings, ImageBytes


class AsyncPyTorchTransport(AsyncHttpTransport):
    """Implements `transport.AsyncTransport`. The service has one model, so the model's name is not sent."""

    async def send(self, images: Sequence[ImageBytes], timeout_s: float | None) -> Embeddings:
        body = json.dumps({"images": [base64.b64encode(image).decode("ascii") for image in images]}).encode()
        headers = {"Content-Type": "application/json"}
        answer = await self._request("POST", "embed/base64", timeout_s, headers=headers, content=body)
        if answer.status_code != httpx.codes.OK:
            raise error_from_http(answer.status_code, answer.content, url=self._url)
        return read_answer(answer.content, len(images))

    async def is_ready(self, timeout_s: float | None) -> bool:
        return await self._is_inference_server("health", "embed/base64", timeout_s)

    async def server_info(self, timeout_s: float | None) -> ServerInfo:
        """Nothing: the service does not report its weights."""
        return ServerInfo()


class PyTorchTransport(HttpTransport):
    """Implements `transport.Transport`."""

    async_transport = AsyncPyTorchTransport


def read_answer(body: bytes, count: int) -> Embeddings:
    """The (count, D) embeddings in `{"embeddings": [[...], ...]}`.

    Raises:
        ContractError: The body has something else.
    """
    try:
        embeddings = np.array(json.loads(body)["embeddings"], dtype=np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(f"expected a JSON object with embeddings, got {body[:200]!r}") from error
    if embeddings.ndim != 2 or len(embeddings) != count or not (np.abs((embeddings**2).sum(axis=1) - 1) < 2e-2).all():
        raise ContractError(
            f"expected ({count}, D) numbers in rows of L2 norm 1, got {embeddings.shape}; {ContractError.advice}"
        )
    return embeddings
