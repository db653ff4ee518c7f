"""JPEG decoding on the GPU by NVIDIA's nvImageCodec, for `mode: "nvimgcodec"`."""

import sys
from collections.abc import Callable

import numpy as np

Decode = Callable[[bytes], np.ndarray | None]


def open_decoder(device_id: int = 0) -> Decode:
    """What turns a JPEG's bytes into (height, width, 3) uint8 RGB on this GPU, or None where it cannot.

    No EXIF rotation, one thread of the CPU, and the chroma upsampled smoothly as libjpeg does it by default. A GPU that
    fails later on gives None as well, and a line on stderr: that is not the image's fault. Raises ValueError where the
    package or the GPU is missing.
    """
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise ValueError(
            f"mode nvimgcodec needs the packages nvidia-nvimgcodec-cu13 and nvidia-nvjpeg ({error}); "
            "install them (`make setup-gpu`), or take mode exact or fast"
        ) from error
    try:
        decoder = nvimgcodec.Decoder(device_id=device_id, max_num_cpu_threads=1, options=":fancy_upsampling=1")
    except RuntimeError as error:  # CUDA's own: no driver, no such device
        raise ValueError(f"mode nvimgcodec needs an NVIDIA GPU: {error}; take mode exact or fast") from error
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(image_bytes: bytes) -> np.ndarray | None:
        if not image_bytes.endswith(b"\xff\xd9"):
            return None  # cut off, or with something behind it: Pillow knows which
        try:
            image = decoder.decode(image_bytes, params=params)  # None, and a line on stderr, for what it cannot decode
            return None if image is None else np.asarray(image.cpu())
        except RuntimeError as error:
            sys.stderr.write(f"nvimgcodec: {error}\n")
            return None

    return decode
