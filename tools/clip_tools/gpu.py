"""Finds the GPU of this machine by its driver, without CUDA toolkit, PyTorch or TensorRT."""

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability such as "8.9", and the newest CUDA version of its driver, such as "13.0"."""

    name: str
    compute_capability: str
    cuda: str


def find_gpu() -> Gpu | None:
    """The first GPU in CUDA_VISIBLE_DEVICES; None without a GPU or a working driver.

    A child process asks the driver: after that, CUDA does not work in a fork (triton-lang/triton#10443), and the
    container builds its plan in a fork.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    asked = subprocess.run([sys.executable, "-m", "clip_tools.gpu"], capture_output=True, text=True, check=False)
    return Gpu(**json.loads(asked.stdout)) if asked.returncode == 0 else None


def _ask_driver() -> Gpu | None:
    cuda = ctypes.CDLL("libcuda.so.1")
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    asked = (
        cuda.cuInit(0)
        or cuda.cuDeviceGetCount(ctypes.byref(count))
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
    )
    if asked != 0:  # the first failed call, such as CUDA_ERROR_NO_DEVICE
        return None
    return Gpu(
        name.value.decode(errors="replace"),
        f"{major.value}.{minor.value}",
        f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


if __name__ == "__main__":
    found = _ask_driver()
    if found is None:
        sys.exit(1)
    sys.stdout.write(json.dumps(asdict(found)))
