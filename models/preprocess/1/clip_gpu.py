"""Implements `mode: "gpu"`: nvImageCodec decodes JPEGs, and cuda.core runs the kernel of clip_gpu.cu."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import clip_dlpack
from clip_batch import Batch, OnCpu, Picture, pixels_of_batch
from clip_fit import Fit
from clip_preprocess import ImageLimits, PixelBudget, find_kernel, open_pixels

SOURCE = Path(__file__).resolve().with_name("clip_gpu.cu")
_THREADS = 128  # in a block; not measured


def compiled(architecture: str) -> Any:
    """The kernel, compiled by NVRTC for an architecture such as `sm_90`; needs no GPU. Raises RuntimeError."""
    from cuda.core import Program, ProgramOptions

    return Program(SOURCE.read_text(), "c++", ProgramOptions(arch=architecture)).compile("cubin")


class Block:
    """GPU memory, freed with its last reference."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.pointer = int(buffer.handle)


class CudaGpu:
    """`clip_batch.Gpu` on one CUDA stream. Raises ValueError if a package or the GPU is missing."""

    def __init__(self, device_id: int) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, LaunchConfig, launch
            from nvidia import nvimgcodec
        except ImportError as error:
            raise ValueError(
                f"mode gpu needs the packages cuda-core, nvidia-nvimgcodec-cu13 and nvidia-nvjpeg ({error}); install "
                "them (`make setup-gpu`), or use mode exact or fast"
            ) from error
        self._driver, self._launch, self._config = driver, launch, LaunchConfig
        try:
            self._device = Device(device_id)
            self._device.set_current()
            self._stream = self._device.create_stream()
            self._kernel = compiled(f"sm_{self._device.arch}").get_kernel("resample")
            # One CPU thread; smooth chroma upsampling, as libjpeg's default.
            options = {"max_num_cpu_threads": 1, "options": ":fancy_upsampling=1"}
            self._decoder = nvimgcodec.Decoder(device_id=device_id, **options)
        except Exception as error:  # no driver or no such device; each package has its own exception
            reason = " ".join(str(error).split())
            raise ValueError(f"mode gpu needs an NVIDIA GPU: {reason}; use mode exact or fast") from error
        self._stream_of = nvimgcodec.CodeStream
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        self.device = clip_dlpack.CUDA, device_id

    def decode(self, jpegs: Sequence[bytes]) -> list[Picture | None]:
        """Decode all in one call. If the GPU fails, returns None for all, for the CPU to decode, and logs to stderr."""
        try:
            streams = [self._stream_of(one) for one in jpegs]
            images = self._decoder.decode(streams, params=self._params, cuda_stream=int(self._stream.handle))
        except RuntimeError as error:
            sys.stderr.write(f"nvimgcodec: {error}\n")
            return [None] * len(jpegs)
        return [None if image is None else _picture(image) for image in images]

    def allocate(self, size_bytes: int) -> Block:
        """Allocate in stream order."""
        return Block(self._device.allocate(size_bytes, stream=self._stream))

    def write(self, pointer: int, values: np.ndarray) -> None:
        """Copy from the host. CUDA stages pageable memory before this returns."""
        values = np.ascontiguousarray(values)
        handle = int(self._stream.handle)
        (error,) = self._driver.cuMemcpyHtoDAsync(pointer, values.ctypes.data, values.nbytes, handle)
        if int(error):
            raise RuntimeError(f"copying {values.nbytes} bytes to the GPU: {error}")

    def read(self, pointer: int, values: np.ndarray) -> None:
        """Copy to the host after all earlier work, and wait for it."""
        handle = int(self._stream.handle)
        (error,) = self._driver.cuMemcpyDtoHAsync(values.ctypes.data, pointer, values.nbytes, handle)
        if int(error):
            raise RuntimeError(f"copying {values.nbytes} bytes from the GPU: {error}")
        self._stream.sync()

    def resample(self, grid: tuple[int, int], *tables: int) -> None:
        """Launch the kernel."""
        pixels, images = grid
        config = self._config(grid=(-(-pixels // _THREADS), images), block=_THREADS)
        self._launch(self._stream, config, self._kernel, *tables)

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.sync()


def _picture(image: Any) -> Picture | None:
    """nvImageCodec's image as a `Picture`; None unless it is 8-bit RGB."""
    array = image.__cuda_array_interface__
    height, width, *bands = array["shape"]
    if bands != [3] or array["typestr"] != "|u1":
        return None
    strides = array.get("strides") or (3 * width, 3, 1)
    return Picture(array["data"][0], strides[0], width, height, image) if strides[1:] == (3, 1) else None


class Batches:
    """`clip_batch.pixels_of_batch` on this GPU, with the parameters of `config.pbtxt`."""

    def __init__(self, parameters: Mapping[str, str], gpu: Any) -> None:
        self._gpu, self._limits = gpu, ImageLimits.of(parameters)
        self._shape = self._limits.fit.side_px, self._limits.fit.side_px, 3
        self._upright = parameters.get("orientation", "ignore") == "exif"
        self._on_cpu = open_pixels({**parameters, "mode": "exact"})

    def __call__(self, images: Iterable[tuple[bytes, PixelBudget]], on_cpu: OnCpu) -> Batch:
        """The pixels of these images, each with its request's budget."""
        return pixels_of_batch(images, self._limits, self._gpu, on_cpu, upright=self._upright)

    def pixels_of(self, image_bytes: bytes) -> np.ndarray:
        """One image as (side, side, 3) uint8 RGB on the host. Raises RefusedImage."""
        batch = self([(image_bytes, PixelBudget(self._limits.max_image_pixels))], self.on_cpu)
        if batch.failed:
            raise batch.failed[0]
        pixels = np.empty(self._shape, np.uint8)
        self._gpu.read(batch.memory.pointer, pixels)
        return pixels

    def on_cpu(self, image_bytes: bytes, budget: PixelBudget | None) -> np.ndarray:
        """Preprocess an image that the GPU does not decode."""
        return self._on_cpu(image_bytes, budget=budget)

    def lent(self, batch: Batch, start: int, count: int) -> clip_dlpack.Lent:
        """The pixels of `count` slots from `start` on, (count, side, side, 3), without a copy."""
        pointer = batch.memory.pointer + start * math.prod(self._shape)
        return clip_dlpack.Lent(pointer, (count, *self._shape), self._gpu.device, batch.memory)


def open_batches(parameters: Mapping[str, str], device_id: int = 0) -> Batches:
    """The batches of `mode: "gpu"` on this device. Raises ValueError if that mode cannot run."""
    if find_kernel() is None:
        raise ValueError("mode gpu needs the library of clip_resample.c; `make setup` builds it")
    if not (fit := Fit.of(parameters)).fits_kernel:
        raise ValueError(
            f"mode gpu can only resize bicubically and crop, not {fit.interpolation}, {fit.resize_mode}: use mode exact"
        )
    return Batches(parameters, CudaGpu(device_id))
