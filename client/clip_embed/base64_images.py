"""A drop-in client for code that sends base64 to a service: change only the import.

from clip_embed.base64_images import EmbeddingClient

client = EmbeddingClient.from_env()                 # INFERENCE_SERVICE_URL, INFERENCE_BACKEND
vectors = client.embed_base64_images([text, ...])   # lists of numbers, as from json
"""

import base64
import binascii
from collections.abc import Iterable
from typing import cast

from clip_embed import client
from clip_embed.errors import ImageFailure, InvalidImageError


class EmbeddingClient(client.EmbeddingClient):
    """`clip_embed.EmbeddingClient` with base64 in and lists out. New code should pass bytes to `embed`."""

    def embed_base64_images(self, images: Iterable[str]) -> list[list[float]]:
        """The embeddings of N encoded images in base64, also as data URLs: N lists of numbers, L2 norm 1.

        Raises:
            InvalidImageError: Some are not base64 (code `not_base64`), and nothing is sent; or as in `embed`.
            EmbeddingError: As in `embed`.
            TypeError: One text in place of a sequence.
        """
        if isinstance(images, str):
            raise TypeError("images: expected a sequence of texts in base64, got one text")
        contents, failures = [], []
        for index, image in enumerate(images):
            text = image.partition(",")[2] if image.startswith("data:") else image
            try:
                contents.append(base64.b64decode("".join(text.split()), validate=True))
            except (binascii.Error, ValueError) as error:
                failures.append(ImageFailure(index, "not_base64", str(error)))
        if failures:
            raise InvalidImageError(failures)
        return cast("list[list[float]]", self.embed(contents).tolist())
