"""Divides the images of a call into requests, and puts the results back in order.

The blocking and the async client share it. It starts no thread and sends nothing. It reads the files of one request at
a time.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from clip_embed.errors import EmbeddingError, ImageFailure, InvalidImageError, InvalidInputError, InvalidTextError
from clip_embed.png import PilImage, is_pil_image, png_of_array, png_of_pil
from clip_embed.wire import MAX_IMAGE_BYTES, Embeddings, ImageBytes


class BinaryFile(Protocol):
    """A file as `open(path, "rb")` returns it."""

    def read(self, size: int, /) -> bytes: ...


ImageSource = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryFile | PilImage | NDArray[np.uint8]
"""One image: the bytes of an encoded file, its path (a str is always a path), or the file open for reading.

Or pixels: a Pillow image, or a (H, W, 3) uint8 RGB array. They are sent as PNG, which is lossless. For 512x512 that
costs 8 to 15 ms of CPU and 0.4 MB, where a JPEG has 0.1 MB: pass the file if there is one.
"""

MAX_REQUEST_BYTES = 1 << 30  # a protobuf message is limited to 2 GiB


@dataclass(frozen=True, slots=True)
class Item:
    """One image that was read: its index in the caller's images, its bytes, and its path if it has one."""

    index: int
    image: ImageBytes
    source: str | None


Request = tuple[Item, ...]
"""The items of one request, at least one."""


class Batches:
    """The requests of one call, and its results in the order of its images.

    Args:
        images: read lazily.
        batch_size: at most this many images in a request.
        max_batch_bytes: at most this many bytes in a request; a larger image is sent alone. A file over both this and
            the server's default limit is refused and not read to its end.
        read_ahead: how many images may be read before the first of them has a result. This bounds the memory.
        keep_going: a failure becomes the result of its images; otherwise it is raised.
    """

    def __init__(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int,
        max_batch_bytes: int,
        read_ahead: int,
        keep_going: bool,
    ) -> None:
        self._images = iter(images)
        self._batch_size = batch_size
        self._max_batch_bytes = max_batch_bytes
        self._read_ahead = read_ahead
        self._keep_going = keep_going
        self._left_over: Item | None = None  # read, but too large for the current request
        self._retried: deque[Request] = deque()  # the good images of requests that had bad ones
        self._results: dict[int, Embeddings | EmbeddingError] = {}
        self._exhausted = False
        self._read_count = 0
        self._yielded_count = 0

    @property
    def finished(self) -> bool:
        """Whether every image was read and every result yielded."""
        return self._exhausted and self._yielded_count == self._read_count

    def next_request(self) -> Request | None:
        """The next request; None if there is none left, or none before more results are taken.

        Raises:
            InvalidImageError: A file cannot be read, and keep_going is False.
            TypeError: An image is not an `ImageSource`.
        """
        if self._retried:
            return self._retried.popleft()
        items: list[Item] = []
        size_bytes = 0
        while len(items) < self._batch_size and (self._left_over or self._may_read()):
            item, self._left_over = self._left_over or self._read_next(), None
            if item is None:
                continue
            size_bytes += len(item.image)
            if items and size_bytes > self._max_batch_bytes:
                self._left_over = item
                break
            items.append(item)
        return tuple(items) if items else None

    def succeed(self, request: Request, embeddings: Embeddings) -> None:
        """Record the (n, D) embeddings of a request of n images."""
        self._results.update(zip((item.index for item in request), embeddings, strict=True))

    def fail(self, request: Request, error: EmbeddingError) -> None:
        """Record a request's final error, as the result of its bad images or, if it names none, of all its images.

        The good images of a request with bad ones become a new request.

        Raises:
            EmbeddingError: The error, with the caller's indices; keep_going is False.
        """
        failures: dict[int, ImageFailure] = {}
        if isinstance(error, InvalidInputError):
            named = {failure.index: failure for failure in error.failures}
            failures = {
                item.index: replace(named[place], index=item.index, source=item.source)
                for place, item in enumerate(request)
                if place in named
            }
        if not self._keep_going:
            if failures:
                raise type(error)(list(failures.values())) from error
            raise error
        for index, failure in failures.items():
            self._results[index] = type(error)([failure])
        rest = tuple(item for item in request if item.index not in failures)
        if failures and rest:
            self._retried.append(rest)
        elif rest:
            self._results.update((item.index, error) for item in rest)

    def ready(self) -> Iterator[Embeddings | EmbeddingError]:
        """The results that are next in order, each yielded once."""
        while self._yielded_count in self._results:
            result = self._results.pop(self._yielded_count)
            self._yielded_count += 1
            yield result

    def _may_read(self) -> bool:
        return not self._exhausted and self._read_count - self._yielded_count < self._read_ahead

    def _read_next(self) -> Item | None:
        try:
            image = next(self._images)
        except StopIteration:
            self._exhausted = True
            return None
        index = self._read_count
        self._read_count += 1
        try:
            return read_image(image, index, max_file_bytes=max(self._max_batch_bytes, MAX_IMAGE_BYTES))
        except InvalidImageError as error:
            if not self._keep_going:
                raise
            self._results[index] = error
            return None


def read_image(image: ImageSource, index: int, *, max_file_bytes: int = MAX_IMAGE_BYTES) -> Item:
    """The image with its bytes: given bytes are not copied, a file is read, pixels are encoded.

    Raises:
        InvalidImageError: The file cannot be read (`unreadable`), or the image is too large (`too_large`).
        TypeError: It is not an `ImageSource`.
    """
    source = None
    content: ImageBytes
    match image:
        case bytes():
            content = image
        case bytearray() | memoryview():
            view = memoryview(image)
            content = view.cast("B") if view.nbytes and view.c_contiguous else view.tobytes()
        case str() | os.PathLike():
            path = source = os.fsdecode(image)
            content = _read_or_fail(index, source, lambda: _read_file(path, max_file_bytes + 1))
        case np.ndarray():
            try:
                content = png_of_array(image)
            except TypeError as error:
                raise TypeError(f"images[{index}]: {error}") from None
        case _ if is_pil_image(image):
            content = _read_or_fail(index, None, lambda: png_of_pil(cast(PilImage, image)))
        case _ if hasattr(image, "read"):
            name = getattr(image, "name", None)
            source = name if isinstance(name, str) else None
            content = _read_or_fail(index, source, lambda: _read_open(image, max_file_bytes + 1))
        case _:
            raise TypeError(
                f"images[{index}]: expected the bytes of an encoded image file, a path, a file open for reading, a "
                f"Pillow image or a (H, W, 3) uint8 array, got {type(image).__name__}"
            )
    if len(content) > max_file_bytes and not isinstance(image, bytes | bytearray | memoryview):
        reason = f"over {max_file_bytes} bytes; if the server accepts more, raise max_batch_bytes"
        raise InvalidImageError([ImageFailure(index, "too_large", reason, source)])
    if len(content) > MAX_REQUEST_BYTES:
        reason = f"{len(content)} bytes; a request holds at most {MAX_REQUEST_BYTES}"
        raise InvalidImageError([ImageFailure(index, "too_large", reason, source)])
    return Item(index, content, source)


def _read_or_fail(index: int, source: str | None, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL, a closed file, a mode that PNG lacks
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidImageError([ImageFailure(index, "unreadable", reason, source)]) from error


def _read_open(file: Any, size_bytes: int) -> bytes:
    """The rest of an open file, at most `size_bytes`. Some kinds of file return less than asked for in one read."""
    parts: list[bytes] = []
    while size_bytes > 0 and (part := file.read(size_bytes)):
        if isinstance(part, str):
            raise ValueError("the file is open as text; open it with mode 'rb'")
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def _read_file(path: str, size_bytes: int) -> bytes:
    """At most `size_bytes` of a file. Raises OSError at once for a device, a FIFO or a folder."""
    _require_file(os.stat(path))  # noqa: PTH116  before opening, which affects some devices
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        _require_file(status)
        content = file.read(min(size_bytes, status.st_size + 1))  # asking for 32 MiB at once would cost 0.2 ms
        if len(content) > status.st_size:  # it has grown, or reports size 0 like files in /proc
            content += file.read(size_bytes - len(content))
        return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_file(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a file, got a device, a FIFO or a socket")


def require_sequence(images: Iterable[ImageSource]) -> None:
    """Raises TypeError for a single image, whose letters or bytes would be taken for images."""
    is_image = isinstance(images, np.ndarray) and images.ndim < 4  # with four dimensions it is a sequence of images
    if is_image or hasattr(images, "read") or isinstance(images, str | bytes | bytearray | memoryview | os.PathLike):
        raise TypeError(f"expected a sequence of images, got one {type(images).__name__}; give [image]")


def text_bytes(texts: Iterable[str]) -> Iterator[bytes]:
    """Each text in UTF-8.

    Raises:
        InvalidTextError: A text has an unpaired surrogate, so it is not Unicode (`not_text`).
        TypeError: One text in place of a sequence, or something that is not a text.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"expected a sequence of texts, got one {type(texts).__name__}; give [text]")
    return map(_utf8, enumerate(texts))


def _utf8(numbered: tuple[int, str]) -> bytes:
    index, text = numbered
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}]: expected a str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            [ImageFailure(index, "not_text", f"{error.reason} at character {error.start}")]
        ) from error
