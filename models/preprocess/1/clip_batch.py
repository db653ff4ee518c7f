"""Preprocesses whole batches for `mode: "gpu"`: divides the images between GPU and CPU and fills the kernel's tables.

It needs no GPU itself: it calls a `Gpu`, which clip_gpu.py implements.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

import clip_resample
from clip_fit import Fit
from clip_orientation import Turn, turn_of
from clip_preprocess import ImageLimits, PixelBudget, opened

# Decoded at once: 64 photographs of 12 megapixels, 2.4 GB.
_MAX_PIXELS_AT_ONCE = 800_000_000
_BANDS = 3


class Picture(NamedTuple):
    """A decoded image on the GPU, interleaved 8-bit RGB; `owner` keeps its memory alive."""

    pointer: int
    row_bytes: int
    width: int
    height: int
    owner: Any


class Memory(Protocol):
    """A block of GPU memory, freed with its last reference."""

    pointer: int


class Gpu(Protocol):
    """The GPU operations that this module needs. They run in the order of the calls."""

    def decode(self, jpegs: Sequence[bytes]) -> Sequence[Picture | None]:
        """Decode all in one call, ignoring EXIF; None for each that cannot be decoded."""

    def allocate(self, size_bytes: int) -> Memory:
        """Allocate uninitialised memory."""

    def write(self, pointer: int, values: np.ndarray) -> None:
        """Copy from the host. The array may change once this returns."""

    def resample(self, grid: tuple[int, int], *tables: int) -> None:
        """Run clip_gpu.cu on the tables at these pointers; `grid` is (pixels, images)."""

    def finish(self) -> None:
        """Wait until all work is done."""


@dataclass(frozen=True)
class Job:
    """A JPEG to decode on the GPU; `slot` is its index in the batch."""

    slot: int
    image_bytes: bytes
    width: int
    height: int
    turn: Turn | None


@dataclass(frozen=True)
class Batch:
    """The pixels of all images, (N, side, side, 3) uint8 RGB in `memory`, and the errors of failed ones by slot."""

    memory: Memory
    failed: dict[int, Exception]


# (image_bytes, budget) -> pixels. The budget is None if the image was charged already.
OnCpu = Callable[[bytes, PixelBudget | None], np.ndarray]


def pixels_of_batch(
    images: Iterable[tuple[bytes, PixelBudget]], limits: ImageLimits, gpu: Gpu, on_cpu: OnCpu, *, upright: bool
) -> Batch:
    """The pixels of encoded images, each given with its request's budget.

    RGB JPEGs are decoded on the GPU, to pixels close to libjpeg's, and resized with Pillow's arithmetic. `on_cpu` takes
    all other images and those that the GPU cannot decode. An exception for one image fails only that image.
    """
    images, failed = list(images), {}
    size_bytes = limits.fit.side_px**2 * _BANDS
    memory = gpu.allocate(max(1, len(images)) * size_bytes)

    def by_cpu(slot: int, budget: PixelBudget | None) -> None:
        try:
            pixels = on_cpu(images[slot][0], budget)
        except Exception as error:
            failed[slot] = error
        else:
            gpu.write(memory.pointer + slot * size_bytes, pixels)

    jobs = []
    for slot, (image_bytes, budget) in enumerate(images):
        try:
            job = _job_of(slot, image_bytes, budget, limits, upright)
        except Exception as error:
            failed[slot] = error
            continue
        if job:
            jobs.append(job)
        else:
            by_cpu(slot, budget)
    for some in _at_once(jobs):
        decoded = list(zip(some, gpu.decode([job.image_bytes for job in some]), strict=True))
        good = [(job, picture) for job, picture in decoded if picture and _is_right(job, picture)]
        targets = [memory.pointer + job.slot * size_bytes for job, _ in good]
        kept = _resample([(picture, job.turn) for job, picture in good], targets, gpu, limits.fit)
        slots = {job.slot for job, _ in good}
        for job in some:
            if job.slot not in slots:
                by_cpu(job.slot, None)
        gpu.finish()
        del decoded, good, kept  # the GPU was still using them
    gpu.finish()
    return Batch(memory, failed)


def _job_of(slot: int, image_bytes: bytes, budget: PixelBudget, limits: ImageLimits, upright: bool) -> Job | None:
    """The job for an image; None if Pillow should decode it. Raises RefusedImage."""
    if not image_bytes.startswith(b"\xff\xd8") or not image_bytes.endswith(b"\xff\xd9"):
        return None  # truncated, or with trailing data: Pillow tells which
    image = opened(image_bytes, limits)
    if (image.format, image.mode) != ("JPEG", "RGB"):
        return None
    budget.take(image, limits.fit)
    return Job(slot, image_bytes, image.width, image.height, turn_of(image) if upright else None)


def _at_once(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    some: list[Job] = []
    pixels = 0
    for job in jobs:
        if some and pixels + job.width * job.height > _MAX_PIXELS_AT_ONCE:
            yield some
            some, pixels = [], 0
        some.append(job)
        pixels += job.width * job.height
    if some:
        yield some


def _is_right(job: Job, picture: Picture) -> bool:
    return (picture.width, picture.height) == (job.width, job.height)


_PASS = np.dtype(  # struct pass of clip_gpu.cu
    [
        *((name, np.int64) for name in ("source", "target")),
        *((name, np.int64) for name in ("source_along", "source_beside", "target_along", "target_beside")),
        *((name, np.int32) for name in ("axis", "whole", "stride", "count", "beside", "is_along_fastest")),
    ]
)


class _Axes:
    """The resampling windows of all axes of a batch, without duplicates."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        self._axes: list[clip_resample.Axis] = []
        self._windows = self._coefficients = 0

    def place(self, *which: int) -> tuple[clip_resample.Axis, dict[str, int]]:
        """The axis and its position in the tables."""
        axis = _axis(*which)
        if which not in self._places:
            self._places[which] = self._windows, self._coefficients
            self._axes.append(axis)
            self._windows += len(axis.first)
            self._coefficients += axis.whole.size
        windows, coefficients = self._places[which]
        fields = {"axis": windows, "whole": coefficients, "stride": axis.whole.shape[1], "count": len(axis.first)}
        return axis, fields

    def tables(self) -> list[np.ndarray]:
        """The tables `first`, `taps` and `whole`."""
        return [np.concatenate([table.reshape(-1) for table in tables]) for tables in zip(*self._axes, strict=True)]


@lru_cache(maxsize=256)
def _axis(length: int, resized: int, kept: int, count: int, is_mirrored: int) -> clip_resample.Axis:
    return clip_resample.kernel().axis(length, resized, kept, count, bool(is_mirrored))


def _resample(pictures: Sequence[tuple[Picture, Turn | None]], targets: Sequence[int], gpu: Gpu, fit: Fit) -> list:
    """Start both passes over all pictures. The caller must keep the returned memory until they are done."""
    if not pictures:
        return []
    axes = _Axes()
    passes = np.zeros((2, len(pictures)), _PASS)
    needed = [_fill(passes[:, index], axes, *one, fit) for index, one in enumerate(pictures)]
    between = gpu.allocate(sum(needed))
    start = np.cumsum([0, *needed[:-1]]) + between.pointer
    passes[0]["target"] += start
    passes[1]["source"] += start
    passes[1]["target"] += targets
    kept, pointers = [between], []
    for table in (passes, *axes.tables()):
        kept.append(gpu.allocate(table.nbytes))
        gpu.write(kept[-1].pointer, table)
        pointers.append(kept[-1].pointer)
    for number in range(2):
        pixels = int((passes[number]["count"].astype(np.int64) * passes[number]["beside"]).max())
        gpu.resample((pixels, len(pictures)), pointers[0] + number * passes[0].nbytes, *pointers[1:])
    return kept


def _fill(passes: np.ndarray, axes: _Axes, picture: Picture, turn: Turn | None, fit: Fit) -> int:
    """Write the two passes of a picture into `passes`; returns the bytes of the intermediate image, `between`.

    Offsets of `between` and the target count from 0. For a rotation the image is not moved: the windows are mirrored,
    and the target's strides do the rest.
    """
    side_px, sizes = fit.side_px, fit.resized(picture.width, picture.height)
    mirrors, is_sideways = (turn.mirrors, turn.is_sideways) if turn else ((False, False), False)
    lengths = picture.width, picture.height
    both = [
        axes.place(length, size, fit.offset(size), side_px, int(is_mirrored))
        for length, size, is_mirrored in zip(lengths, sizes, mirrors, strict=True)
    ]
    source_step = _BANDS, picture.row_bytes  # across, down
    target_step = (side_px * _BANDS, _BANDS) if is_sideways else (_BANDS, side_px * _BANDS)
    target = sum((side_px - 1) * step for step, is_mirrored in zip(target_step, mirrors, strict=True) if is_mirrored)
    target_step = [-step if is_mirrored else step for step, is_mirrored in zip(target_step, mirrors, strict=True)]
    less = [length - size for length, size in zip(lengths, sizes, strict=True)]
    # Pillow's order of the passes, for the rotated image; see clip_resample.c.
    across, down = less[::-1] if is_sideways else less
    first = int((down > 0 and down > 2 * across) != is_sideways)  # 0: across
    then = 1 - first
    (_, fields), (seen, then_fields) = both[first], both[then]
    begin, end = int(seen.first.min()), int((seen.first + seen.taps).max())
    between_step = _BANDS, _BANDS * (side_px if first == 0 else end - begin)
    passes[0] = _row(
        source=picture.pointer + begin * source_step[then],
        source_along=source_step[first],
        source_beside=source_step[then],
        target_along=between_step[first],
        target_beside=between_step[then],
        beside=end - begin,
        is_along_fastest=first == 0,
        **fields,
    )
    passes[1] = _row(
        source=-begin * between_step[then],
        source_along=between_step[then],
        source_beside=between_step[first],
        target=target,
        target_along=target_step[then],
        target_beside=target_step[first],
        beside=side_px,
        is_along_fastest=then == 0,
        **then_fields,
    )
    return side_px * (end - begin) * _BANDS


def _row(**fields: int) -> tuple[int, ...]:
    return tuple(fields.get(name, 0) for name in _PASS.names)
