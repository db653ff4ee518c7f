"""A GPU emulated on the host: the kernel of clip_gpu.cu compiled for the CPU, and Pillow as the decoder."""

import ctypes
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

import clip_batch
import clip_dlpack

# CUDA's keywords for a C compiler. The threads of all blocks run in turn.
ON_CPU = """
#define __global__ static
static struct { unsigned x, y; } blockIdx, blockDim, threadIdx;
#include "clip_gpu.cu"
void run(unsigned pixels, unsigned images, void *passes, void *first, void *taps, void *whole) {
    blockDim.x = 128;
    for (blockIdx.y = 0; blockIdx.y < images; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x * blockDim.x < pixels; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                resample(passes, first, taps, whole);
}
"""


def build(folder: Path) -> Path:
    """Compile the kernel into a library in this folder."""
    (folder / "on_cpu.c").write_text(ON_CPU)
    command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror"]
    command += ["-I", str(Path(clip_batch.__file__).parent), "-x", "c", "on_cpu.c", "-o", "on_cpu.so"]
    subprocess.run(command, cwd=folder, check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)})
    return folder / "on_cpu.so"


class HostGpu:
    """A `clip_batch.Gpu` in the host's memory. It decodes by Pillow, and refuses what begins with `fails`."""

    device = clip_dlpack.CPU, 0

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).run
        self._run.argtypes = [ctypes.c_uint, ctypes.c_uint, *[ctypes.c_void_p] * 4]
        self.calls, self.fails = [], []

    def decode(self, jpegs):
        self.calls.append(len(jpegs))
        return [None if one in self.fails else self._decoded(one) for one in jpegs]

    def _decoded(self, jpeg):
        width, height = (image := Image.open(io.BytesIO(jpeg))).size
        rows = np.zeros((height, width * 3 + 5), np.uint8)  # rows are padded, as nvImageCodec may
        rows[:, : width * 3] = np.asarray(image).reshape(height, -1)
        return clip_batch.Picture(rows.ctypes.data, rows.shape[1], width, height, rows)

    def allocate(self, size_bytes):
        array = np.full(size_bytes, 99, np.uint8)
        return SimpleNamespace(pointer=array.ctypes.data, array=array)

    def write(self, pointer, values):
        ctypes.memmove(pointer, np.ascontiguousarray(values).ctypes.data, values.nbytes)

    def read(self, pointer, values):
        ctypes.memmove(values.ctypes.data, pointer, values.nbytes)

    def resample(self, grid, *tables):
        self._run(*grid, *tables)

    def finish(self):
        pass
