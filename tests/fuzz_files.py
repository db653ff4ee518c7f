"""Hostile image files: bombs, real odd files and damaged ones. The name of a case is enough to make it.

python -m tests.fuzz_files "damaged 7 1234" > case.bin      # the 1234th of seed 7, byte for byte
python -m tests.fuzz_files --names 7 300                    # bombs, odd files, 300 damaged ones: their names
"""

import functools
import itertools
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from clip_tools import photos
from tests import fuzz_bombs
from tests.fuzz_bombs import BOMBS, LARGEST, encoded, segment

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM", "ICO", "TGA")
_TIFF_COMPRESSIONS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_lzma", "zstd", "group4")
_ACCEPTED = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpf",
        ".avif",
        ".avifs",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".ico",
        ".cur",
        ".tga",
    ]
)
_ODD_SIZE_BYTES = 300_000  # damage to a larger file usually hits only its pixels
_INTERESTING = (0, 1, 2, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, 32767, 32768, 65500, 65535)
_INTERESTING_32 = (*_INTERESTING, 1 << 16, 100_000_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

Damage = Callable[[random.Random, bytes], bytes]


def names(seed: int, damaged: int, *, every_odd: int = 1, largest: bool = False) -> list[str]:
    """The names of the bombs, of a part of the odd files, and of this many damaged files."""
    bombs = [*BOMBS, *(LARGEST if largest else ())]
    return [
        *(f"bomb {name}" for name in bombs),
        *(f"odd {name}" for name in list(odd_files())[::every_odd]),
        *(f"damaged {seed} {index}" for index in range(damaged)),
    ]


def make(name: str) -> bytes:
    """The case of this name."""
    kind, which = name.split(" ", 1)
    if kind == "bomb":
        return {**BOMBS, **LARGEST}[which][1]()
    if kind == "odd":
        return odd_files()[which].read_bytes()
    rng = random.Random(which)  # noqa: S311
    content = rng.choice(whole_files())
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        content = rng.choice(_damages_of(content))(rng, content)
    return content


@functools.cache
def odd_files() -> dict[str, Path]:
    """Pillow's own test images, good and broken, by their path."""
    folder = photos.odd_images()
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


@functools.cache
def whole_files() -> tuple[bytes, ...]:
    """The files to damage: half are photographs in every format and many variants, half are small odd files."""
    with Image.open(photos.demo_photos()[0]) as one, Image.open(photos.demo_photos()[1]) as other:
        photo, second = one.convert("RGB").resize((160, 107)), other.convert("RGB").resize((160, 107))
    files = [encoded(photo, image_format) for image_format in FORMATS]
    files += [encoded(photo.convert("L"), image_format) for image_format in ("JPEG", "PNG", "TIFF", "JPEG2000", "PPM")]
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a photograph", 6
    profile = fuzz_bombs.noise(70_000)
    for options in (
        {"progressive": True},
        {"progressive": True, "subsampling": 0, "quality": 95},
        {"optimize": True, "restart_marker_blocks": 3},
        {"exif": exif, "icc_profile": profile, "comment": "hello"},
    ):
        files.append(encoded(photo, "JPEG", **options))
    files.append(encoded(photo.convert("CMYK"), "JPEG"))
    files.append(encoded(photo, "MPO", save_all=True, append_images=[second.copy()]))
    for mode in ("1", "P", "LA", "RGBA", "I;16"):
        image = Image.new("I;16", (160, 107), 3000) if mode == "I;16" else photo.convert(mode)
        files.append(encoded(image, "PNG"))
    files.append(encoded(photo, "PNG", icc_profile=profile, exif=exif))
    files += [
        encoded(photo, "HEIF", tile_size=64, exif=exif, icc_profile=profile),
        encoded(photo.convert("RGBA"), "HEIF", chroma=444),
        encoded(photo.convert("L"), "HEIF"),
        fuzz_bombs.deep_heif(32),
    ]
    for image_format in ("PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF"):
        files.append(encoded(photo, image_format, save_all=True, append_images=[second.copy()]))
    for compression in _TIFF_COMPRESSIONS:
        image = photo.convert("1") if compression == "group4" else photo
        files.append(encoded(image, "TIFF", compression=compression))
    files.append(encoded(photo.convert("CMYK"), "TIFF", compression="tiff_lzw"))
    files.append(encoded(photo, "TIFF", big_tiff=True))
    for options in ({"lossless": True}, {"exif": exif, "icc_profile": profile}):
        files.append(encoded(photo, "WEBP", **options))
    files.append(encoded(photo.convert("RGBA"), "WEBP"))
    files.append(encoded(photo.convert("RGBA"), "AVIF"))
    for options in (
        {"irreversible": True, "quality_layers": [20, 10, 5]},
        {"tile_size": (64, 64), "codeblock_size": (8, 8), "precinct_size": (32, 32), "progression": "RPCL"},
        {"no_jp2": True, "num_resolutions": 3},
    ):
        files.append(encoded(photo, "JPEG2000", **options))
    files.append(encoded(photo.convert("P"), "TGA", compression="tga_rle"))
    files.append(encoded(photo, "ICO", bitmap_format="bmp"))
    files.append(fuzz_bombs.rle_bitmap(64, 48, b"\x20\x05\x20\x07\0\0" * 48 + b"\0\1"))
    files.append(b"P3 16 12 255\n" + b"1 20 255 " * 192)
    files.append(b"P6 16 12 100\n" + fuzz_bombs.noise(576))
    odd = [
        path.read_bytes()
        for path in odd_files().values()
        if path.suffix.lower() in _ACCEPTED and 0 < path.stat().st_size <= _ODD_SIZE_BYTES
    ]
    step = -(-len(odd) // len(files))
    return (*itertools.chain.from_iterable(zip(*[files] * step, strict=True)), *odd)


def _damages_of(content: bytes) -> tuple[Damage, ...]:
    """Damage bytes, and the segments or chunks of formats whose structure is known."""
    if content.startswith(b"\xff\xd8"):
        return (*_DAMAGES, *[_damage_jpeg] * 6)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return (*_DAMAGES, *[_damage_png] * 6)
    return _DAMAGES


def _span(rng: random.Random, content: bytes) -> tuple[int, int]:
    """The begin and end of a range inside the file, mostly a short one."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 4, 16, 256, 4096, len(content))))


def _flip(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite_a_number(rng: random.Random, content: bytes) -> bytes:
    """Change a number near the begin, near the end or anywhere."""
    size, order = rng.choice((1, 2, 2, 4, 4, 8)), rng.choice(("big", "little"))
    near = rng.choice((64, 512, len(content)))
    place = rng.randrange(max(1, min(near, len(content)))) if rng.random() < 0.8 else max(0, len(content) - near)
    number = rng.choice(_INTERESTING_32 if size > 2 else _INTERESTING) % (1 << (8 * size))
    return content[:place] + number.to_bytes(size, order) + content[place + size :]


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _drop(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + content[end:]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    times = rng.choice((1, 2, 50)) if end - start < 5000 else 1
    return content[:start] + content[start:end] * times + content[start:]


def _swap(rng: random.Random, content: bytes) -> bytes:
    one, other = sorted((_span(rng, content), _span(rng, content)))
    middle = max(one[1], other[0])
    return (
        content[: one[0]]
        + content[middle : max(middle, other[1])]
        + content[one[1] : middle]
        + content[one[0] : one[1]]
        + content[max(middle, other[1]) :]
    )


def _insert_noise(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + rng.randbytes(rng.choice((1, 3, 64, 5000))) + content[rng.choice((start, end)) :]


def _splice(rng: random.Random, content: bytes) -> bytes:
    other = rng.choice(whole_files())
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


_DAMAGES: tuple[Damage, ...] = (
    _flip,
    _overwrite_a_number,
    _overwrite_a_number,
    _overwrite_a_number,
    _cut,
    _drop,
    _repeat,
    _swap,
    _insert_noise,
    _splice,
)


def _damage_jpeg(rng: random.Random, content: bytes) -> bytes:
    """Swap, drop, repeat or lengthen a segment, or change its length or its fields."""
    parts, position = [], 2
    while position + 4 <= len(content) and content[position] == 0xFF and len(parts) < 100:
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        end = position + 2 + max(2, length)
        if content[position + 1] == 0xDA:  # with its data, up to the next marker
            while end < len(content) and not (content[end - 1] == 0xFF and content[end] not in (0, *range(0xD0, 0xD8))):
                end += 1
            end -= end < len(content)
        parts.append(content[position:end])
        position = end
    rest = content[position:]
    if not parts:
        return _flip(rng, content)
    index = rng.randrange(len(parts))
    part = bytearray(parts[index])
    what = rng.randrange(8)
    if what == 0:
        other = rng.randrange(len(parts))
        parts[index], parts[other] = parts[other], parts[index]
    elif what == 1:
        del parts[index]
    elif what == 2:
        parts[index : index + 1] = [parts[index]] * rng.choice((2, 10, 300))
    elif what == 3:
        parts.insert(index, segment(rng.choice((0xE1, 0xE2, 0xED, 0xFE)), rng.randbytes(rng.choice((0, 30, 65_000)))))
    elif what == 4:
        struct.pack_into(">H", part, 2, rng.choice(_INTERESTING))
        parts[index] = bytes(part)
    elif what == 5:
        part[1] = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCA, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0x01, 0xF0))
        parts[index] = bytes(part)
    else:
        for _ in range(rng.choice((1, 1, 3))):
            part[rng.randrange(min(len(part), 40))] = rng.choice((rng.randrange(256), *_INTERESTING[:12]))
        parts[index] = bytes(part)
    return content[:2] + b"".join(parts) + rest


def _damage_png(rng: random.Random, content: bytes) -> bytes:
    """Swap, drop, repeat or change a chunk, with a correct checksum; or change the stream of pixels."""
    parts, position = [], 8
    while position + 12 <= len(content) and len(parts) < 1000:
        size = int.from_bytes(content[position : position + 4], "big")
        parts.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + size]))
        position += 12 + size
    if not parts:
        return _flip(rng, content)
    index = rng.randrange(len(parts)) if rng.random() < 0.6 else 0
    kind, body = parts[index]
    what = rng.randrange(5)
    if what == 0:
        other = rng.randrange(len(parts))
        parts[index], parts[other] = parts[other], parts[index]
    elif what == 1:
        del parts[index]
    elif what == 2:
        parts[index : index + 1] = [parts[index]] * rng.choice((2, 10, 300))
    elif what == 3 and kind == b"IDAT":
        try:
            pixels = zlib.decompress(body)
        except zlib.error:
            pixels = body
        parts[index] = (kind, zlib.compress(_flip(rng, pixels), 1))
    else:
        parts[index] = (kind, rng.choice((_flip, _overwrite_a_number, _cut))(rng, body))
    return content[:8] + b"".join(fuzz_bombs.chunk(*part) for part in parts)


def main(arguments: list[str]) -> None:
    """Write one case, or the names of many, to stdout."""
    if arguments[0] == "--names":
        sys.stdout.write("\n".join(names(int(arguments[1]), int(arguments[2]))) + "\n")
    else:
        sys.stdout.buffer.write(make(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
