"""Opens HEIC and HEIF with the package `pillow-heif`, and bounds what decoding them costs.

libheif limits a file's items (1000), its memory, and each coded image to the size in its header. It does not limit
repeated decoding: a grid may name one item a thousand times, items may share bytes, and each slice of an item may pass
over the whole item. In photographs a grid names each tile once, and a tile is one slice.
"""

import struct
from collections import defaultdict
from functools import cache

from clip_bounds import RefusedImage, boxes, refuse_over

NAME = "HEIF"  # Pillow's name for both
# 10-bit planes, their 8-bit copy and Pillow's: up to 18 bytes a pixel, other formats up to 10. So half the pixels.
_PIXEL_COST = 2
# Passes over an image of the largest size, one for each slice: 0.4 s each for one colour, 1.2 s for 32 MiB of noise.
_MAX_PASSES = 8
# How many times the file's size one image may read.
_MAX_READ = 2
_MAX_UNITS, _MAX_DEPTH = 10_000, 8
# The decoder's configuration, 0.1 KB in photographs. It can contain slices too.
_MAX_SETUP_BYTES = 4096
_CODED = {b"hvc1", b"hev1"}
_NOT_MEASURED = {b"unci", b"mski", b"tili"}  # decoded by libheif itself


@cache
def missing_opener() -> str | None:
    """Make Pillow open HEIF. Returns None, or one line that says why it cannot."""
    try:
        import pillow_heif
    except ImportError as error:
        return f"{error}; install pillow-heif"
    # One thread an image; never a thumbnail in its place.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return None


def check_heif(data: bytes, max_image_pixels: int) -> None:
    """Raises RefusedImage for a file that would take long to decode. A file that is merely broken passes."""
    items = _Items(data)
    try:
        for kind, start, end in boxes(data, 0, len(data)):
            if kind == b"mini":
                raise RefusedImage("unsupported_format", "HEIF in its minimised form is not accepted; send JPEG")
            if kind == b"meta":
                items.read(start + 4, end)
    except (struct.error, IndexError):
        return  # libheif reports it
    if not _CODED & set(items.types.values()):
        return  # AVIF, which has another decoder, or no image that libheif decodes
    max_pixels = max_image_pixels // _PIXEL_COST
    for item in items.types:
        if (pixels := items.pixels(item)) > max_pixels:
            raise RefusedImage("too_many_pixels", f"{pixels} pixels of HEIF; at most {max_pixels} are accepted")
        passed, read_bytes = items.cost(item)
        refuse_over(passed, _MAX_PASSES * max_pixels, "pixels to decode for one image")
        refuse_over(read_bytes, _MAX_READ * len(data), "bytes to decode for one image, more than the file has")


class _Items:
    """The items (images) of a file and their parts, from its tables (ISO/IEC 14496-12 and 23008-12)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.types: dict[int, bytes] = {}
        self._places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # (offset, bytes)
        self._is_elsewhere: set[int] = set()  # items whose offsets are not from the file's start
        self._parts: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: defaultdict[int, list[int]] = defaultdict(list)
        self._costs: dict[int, tuple[int, int]] = {}

    def read(self, start: int, end: int) -> None:
        """Read one `meta` box. Raises struct.error or IndexError if it is truncated."""
        for kind, first, last in boxes(self._data, start, end):
            if kind == b"iinf":
                self._read_types(first, last)
            elif kind == b"iloc":
                self._read_places(first)
            elif kind == b"iref":
                self._read_references(first, last)
            elif kind == b"iprp":
                self._read_sizes(first, last)

    def pixels(self, item: int) -> int:
        """The item's number of pixels, from its header."""
        return max(self._sizes[item], default=0)

    def cost(self, item: int, depth: int = 0) -> tuple[int, int]:
        """The (pixels passed over, bytes read) to decode an item and all its parts."""
        refuse_over(depth, _MAX_DEPTH, "nested HEIF images")
        if item not in self._costs:
            self._costs[item] = (0, 0)  # stops the recursion for an item that contains itself, which libheif refuses
            places = self._places[item] if self.types.get(item) in _CODED else []
            if places and item in self._is_elsewhere:
                raise RefusedImage(
                    "unsupported_format", "HEIF with its pixels in its header is not accepted; send JPEG"
                )
            passed, read_bytes = self.pixels(item), sum(size for _, size in places)
            if read_bytes <= _MAX_READ * len(self._data):
                passed *= max(1, _slices(b"".join(self._data[at : at + size] for at, size in places)))
            for part in self._parts[item]:
                more = self.cost(part, depth + 1)
                passed, read_bytes = passed + more[0], read_bytes + more[1]
            self._costs[item] = passed, read_bytes
        return self._costs[item]

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self._data[at : at + size], "big")

    def _read_types(self, first: int, last: int) -> None:
        for _, start, _ in boxes(self._data, first + (8 if self._data[first] else 6), last):
            width = 2 if self._data[start] < 3 else 4
            item, kind = self._number(start + 4, width), self._data[start + 6 + width : start + 10 + width]
            if item in self.types:
                raise RefusedImage("corrupt", f"HEIF item {item} occurs twice in its table")
            self.types[item] = kind
            if kind in _NOT_MEASURED:
                raise RefusedImage("unsupported_format", f"HEIF of {kind.decode()} is not accepted; send JPEG")

    def _read_places(self, at: int) -> None:
        version, sizes = self._data[at], self._number(at + 4, 2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        width = 2 if version < 2 else 4
        count, at = self._number(at + 6, width), at + 6 + width
        for _ in range(count):
            item, at = self._number(at, width), at + width
            if version and self._number(at, 2) & 15:
                self._is_elsewhere.add(item)
            at += 4 if version else 2
            base, extents, at = self._number(at, base_size), self._number(at + base_size, 2), at + base_size + 2
            for _ in range(extents):
                at += index_size if version else 0
                place, size = base + self._number(at, offset_size), self._number(at + offset_size, length_size)
                self._places[item].append((place, size or len(self._data)))
                at += offset_size + length_size
                if at > len(self._data):
                    raise IndexError

    def _read_references(self, first: int, last: int) -> None:
        width = 4 if self._data[first] else 2
        for kind, start, _ in boxes(self._data, first + 4, last):
            item, count = self._number(start, width), self._number(start + width, 2)
            others = [self._number(start + width + 2 + width * index, width) for index in range(count)]
            if kind == b"dimg":
                self._parts[item] += others
            elif kind == b"auxl":  # alpha, among others
                for other in others:
                    self._parts[other].append(item)

    def _read_sizes(self, first: int, last: int) -> None:
        sizes: list[int] = []
        tables = list(boxes(self._data, first, last))
        for kind, start, end in tables:
            if kind == b"ipco":
                for name, at, stop in boxes(self._data, start, end):
                    refuse_over(
                        stop - at if name == b"hvcC" else 0, _MAX_SETUP_BYTES, "bytes to set up a decoder of HEIF"
                    )
                    sizes.append(self._number(at + 4, 4) * self._number(at + 8, 4) if name == b"ispe" else 0)
        for kind, start, _ in tables:
            if kind != b"ipma":
                continue
            width, is_wide = 4 if self._data[start] else 2, self._data[start + 3] & 1
            at = start + 8
            for _ in range(self._number(start + 4, 4)):
                item, count, at = self._number(at, width), self._data[at + width], at + width + 1
                for _ in range(count):
                    index = self._number(at, 2) & 0x7FFF if is_wide else self._data[at] & 0x7F
                    at += 2 if is_wide else 1
                    if 0 < index <= len(sizes):
                        self._sizes[item].append(sizes[index - 1])


def _slices(content: bytes) -> int:
    """The number of slices in a coded image. Each may pass over the whole image."""
    slices = units = at = 0
    while at + 4 < len(content):
        slices += (content[at + 4] >> 1 & 63) < 32
        units += 1
        refuse_over(units, _MAX_UNITS, "units in an image of HEIF")
        at += 4 + int.from_bytes(content[at : at + 4], "big")
    return slices
