"""A client for the CLIP embedding server: encoded images and texts in, unit vectors out.

from clip_embed import EmbeddingClient

with EmbeddingClient("grpc://localhost:8001") as client:
    embeddings = client.embed(["cat.jpg", "dog.jpg"])  # (2, 512) float32, each row of L2 norm 1
    similarity = embeddings @ embeddings.T             # cosine
    found = embeddings @ client.embed_text(["a dog"])[0]
"""

from clip_embed.aio import AsyncEmbeddingClient
from clip_embed.batches import ImageSource
from clip_embed.client import EmbeddingClient
from clip_embed.errors import (
    ContractError,
    CredentialsError,
    DeadlineExceededError,
    EmbeddingError,
    ImageFailure,
    InvalidImageError,
    InvalidInputError,
    InvalidTextError,
    ModelNotReadyError,
    RequestTooLargeError,
    ServerError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from clip_embed.retry import Retry

__all__ = [
    "AsyncEmbeddingClient",
    "ContractError",
    "CredentialsError",
    "DeadlineExceededError",
    "EmbeddingClient",
    "EmbeddingError",
    "ImageFailure",
    "ImageSource",
    "InvalidImageError",
    "InvalidInputError",
    "InvalidTextError",
    "ModelNotReadyError",
    "RequestTooLargeError",
    "Retry",
    "ServerError",
    "ServerOverloadedError",
    "ServerUnavailableError",
]
