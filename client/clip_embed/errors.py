"""The client's errors, named by what the caller should do, and their mapping from gRPC and HTTP errors.

EmbeddingError                everything below; `retryable` says whether the same call may succeed later
├ InvalidInputError           fix or drop what `.failures` names
│ ├ InvalidImageError         images
│ └ InvalidTextError          texts
├ RequestTooLargeError        lower batch_size or max_batch_bytes, or raise the server's limit
├ ServerUnavailableError      start the server, or try again                        retryable
├ ServerOverloadedError       back off, then try again                              retryable
├ ModelNotReadyError          wait until the model is loaded, or correct its name   retryable
├ DeadlineExceededError       try again, or allow more time                         retryable
├ CredentialsError            give the right key or certificates
├ ContractError               use the client that belongs to the served model
└ ServerError                 read the server's log

A caller's own mistakes (a string in place of a sequence, a malformed URL) raise TypeError and ValueError.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clip_embed.names import printable


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """An image or text that cannot be embedded.

    Args:
        index: position in the caller's images or texts, from 0.
        code: from the server `empty`, `too_large`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `too_complex`, `too_deep`, `truncated` or `corrupt`, and for a text `too_large` or `not_text`; from the
            client `unreadable` (no such file, no permission, a folder, a device), `too_large` or `not_text`.
        reason: one sentence for people; empty if the server gave none.
        source: the image's path, if it was given as one.
    """

    index: int
    code: str
    reason: str = ""
    source: str | None = None

    def __str__(self) -> str:
        return f"[{self.index}] " + ": ".join(filter(None, (printable(self.source or ""), self.code, self.reason)))


class EmbeddingError(Exception):
    """An embedding failed. `retryable`: the same call may succeed later.

    `attempts` is how often the request was sent. A client that retries raises the error of the last attempt.
    """

    retryable: ClassVar[bool] = False
    advice: ClassVar[str] = ""
    attempts: int = 1

    def __str__(self) -> str:
        return super().__str__() + (f" (after {self.attempts} attempts)" if self.attempts > 1 else "")


class InvalidInputError(EmbeddingError):
    """Some images or texts of the call cannot be embedded: fix or drop those in `failures` (at least one)."""

    def __init__(self, failures: Sequence[ImageFailure]) -> None:
        self.failures = tuple(failures)
        super().__init__(self.failures)

    def __str__(self) -> str:
        shown = "; ".join(map(str, self.failures[:5]))
        left_out = f"; and {len(self.failures) - 5} more" if len(self.failures) > 5 else ""
        return f"{len(self.failures)} refused: {shown}{left_out}"


class InvalidImageError(InvalidInputError):
    """Some images of the call cannot be embedded."""


class InvalidTextError(InvalidInputError):
    """Some texts of the call cannot be embedded."""


class RequestTooLargeError(EmbeddingError):
    """One request has more images or bytes than the server accepts."""

    advice = "lower batch_size or max_batch_bytes, or raise the server's limit"


class ServerUnavailableError(EmbeddingError):
    """Nothing listens at the URL, or the connection was lost."""

    retryable = True
    advice = "start the server (make serve), check the URL, or try again"


class ServerOverloadedError(EmbeddingError):
    """The server's queue is full, or the request waited in it for too long."""

    retryable = True
    advice = "back off, then try again"


class ModelNotReadyError(EmbeddingError):
    """The server is up, but does not have the model, is still loading it, or failed to load it."""

    retryable = True
    advice = "wait until it is loaded; if that never happens, check the model's name and the server's log"


class DeadlineExceededError(EmbeddingError):
    """No answer within timeout_s."""

    retryable = True
    advice = "try again, or raise timeout_s"


class CredentialsError(EmbeddingError):
    """Client and server do not trust each other: a key or a certificate is missing or wrong."""

    advice = "give the right api_key (CLIP_API_KEY), ca_file, cert_file and key_file"


class ContractError(EmbeddingError):
    """The server's model does not match this client, or the server is not an inference server."""

    advice = "use the client that belongs to the served model"


class ServerError(EmbeddingError):
    """The server had an internal error."""

    advice = "read the server's log"


# Phrases of Triton, grpc-core and nginx. tests/unit/test_client_errors.py has whole messages, and which were observed.
_QUEUE_FULL = ("Exceeds maximum queue size", "Request timeout expired", "http2 header with status: 429")
# A Python model's process was lost: another server, or this one's replacement, can embed the same images.
_STUB_LOST = "is not healthy"
_NOT_READY = ("unknown model", "no available versions", "not at ready state", "loading or unloading", "not ready")
_NO_TEXTS = "the server has no text tower: run `clip-tools export-onnx --text` there, and restart it"
_DENIED = (
    "is restricted, expecting header",
    "CERTIFICATE_VERIFY_FAILED",
    "CERTIFICATE_REQUIRED",
    "Hostname Verification Check failed",
    "is not in peer certificate",
    "No required SSL certificate was sent",
    "The SSL certificate error",
)
_TOO_LARGE = (
    "batch-size must be <=",
    "message larger than max",
    "--http-max-input-size",
    "http2 header with status: 413",
)
_GRPC_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def error_from_grpc(status: str, message: str, *, url: str) -> EmbeddingError:
    """Our error for a gRPC status name, such as `UNAVAILABLE`, and its message.

    The status alone is not enough: Triton returns UNAVAILABLE for a full queue, for a request that waited too long in
    the queue and for a loading model (triton-inference-server/server#6110, #5348). gRPC itself returns it if nothing
    listens.
    """
    if status == "INVALID_ARGUMENT" and (failures := parse_failures(message)):
        return (InvalidTextError if " texts refused. " in message else InvalidImageError)(failures)
    kind: type[EmbeddingError]
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED") or _contains(message, _DENIED):
        kind = CredentialsError
    elif _contains(message, _TOO_LARGE):
        kind = RequestTooLargeError
    elif status == "DEADLINE_EXCEEDED":
        kind = DeadlineExceededError
    elif status == "RESOURCE_EXHAUSTED" or (status == "UNAVAILABLE" and _contains(message, _QUEUE_FULL)):
        kind = ServerOverloadedError
    elif status in ("NOT_FOUND", "UNAVAILABLE", "INVALID_ARGUMENT") and _contains(message, _NOT_READY):
        kind = ModelNotReadyError
    elif status in ("UNAVAILABLE", "CANCELLED", "ABORTED") or (status == "INTERNAL" and _STUB_LOST in message):
        kind = ServerUnavailableError
    elif status in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"):
        kind = ContractError
    else:
        kind = ServerError
    advice = _NO_TEXTS if "unknown model: 'clip_text_ensemble'" in message else kind.advice
    return kind(f"{url}: {message.strip() or status}; {advice}")


def error_from_http(status: int, body: bytes, *, url: str) -> EmbeddingError:
    """Our error for an HTTP status and its body, which is Triton's `{"error": "..."}` or a proxy's page."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status} {body[:200].decode(errors='replace')}"
    if status == 413:
        return RequestTooLargeError(f"{url}: {message}; {RequestTooLargeError.advice}")
    name = _GRPC_STATUS.get(status, "INTERNAL" if status >= 500 else "UNIMPLEMENTED")
    return error_from_grpc(name, message, url=url)


_REFUSED = re.compile(
    r"(?:image_bytes: \d+ of (?P<images>\d+) images|text: \d+ of (?P<texts>\d+) texts) refused\. (?P<items>.*)",
    re.DOTALL,
)
_ITEM = re.compile(r"(?:^|; )\[(?P<index>\d+)\] (?P<code>[a-z][a-z_]*)(?:: |(?=; \[)|$)")


def parse_failures(message: str) -> tuple[ImageFailure, ...]:
    """The bad images or texts in the server's message, with their indices in the request; empty if it names none.

    The message is written by `models/preprocess` or `models/tokenize`, and Triton puts the model's name before it:
    `in ensemble 'clip_ensemble', image_bytes: 2 of 5 images refused. [1] truncated: ends early; [3] empty: 0 bytes`.
    A reason may itself contain `;` and `[7]`: an item begins only where its index is larger than the last one.
    """
    if (refused := _REFUSED.search(message)) is None:
        return ()
    items, count = refused["items"], int(refused["images"] or refused["texts"])
    starts: list[re.Match[str]] = []
    for item in _ITEM.finditer(items):
        if (int(starts[-1]["index"]) if starts else -1) < int(item["index"]) < count:
            starts.append(item)
    ends = [item.start() for item in starts[1:]] + [len(items)]
    return tuple(
        ImageFailure(int(item["index"]), item["code"], items[item.end() : end])
        for item, end in zip(starts, ends, strict=False)  # without items there is still one end
    )


def _contains(message: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in message for phrase in phrases)
