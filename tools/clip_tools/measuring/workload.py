"""The photographs that measurements embed, with open_clip's own pixels and embeddings."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clip_tools import demo, photos
from clip_tools.accuracy.reference import reference
from clip_tools.errors import ToolError, needs_extra
from clip_tools.export.manifest import Manifest
from clip_tools.measuring.options import PHONE, VGA
from clip_tools.measuring.timing import alone
from clip_tools.oracle import Weights
from clip_tools.paths import CACHE

VGA_JPEG_QUALITY = 90  # about 100 KB a photograph; not measured


@dataclass(frozen=True)
class Workload:
    """N different photographs under one name, with open_clip's pixels and embeddings.

    `embeddings` (N, 512) float32, L2 norm 1; `pixels` (N, 224, 224, 3) uint8 RGB.
    """

    name: str
    images: tuple[bytes, ...]
    embeddings: npt.NDArray[np.float32]
    pixels: npt.NDArray[np.uint8]

    @property
    def mean_size_bytes(self) -> int:
        """The mean size of an encoded photograph."""
        return sum(map(len, self.images)) // len(self.images)


def image_files(name: str, *, count: int = 32) -> list[Path]:
    """`640x480`: real photographs resized to it, centre first; `phone`: 12 MP originals; else a folder's images.

    At most `count`. The four phone originals are all different already.
    """
    if name == PHONE:
        return list(photos.phone_photos())
    if name == VGA:
        return _resized(photos.gate_photos(), count)
    folder = Path(name)
    if not folder.is_dir():
        raise ToolError(f"--images {name}: expected {VGA}, {PHONE} or a folder with images", exit_code=2)
    return photos.images_in(folder)[:count]


def load_images(name: str) -> tuple[bytes, ...]:
    """The contents of `image_files`."""
    return tuple(path.read_bytes() for path in image_files(name))


def _resized(paths: Sequence[Path], count: int) -> list[Path]:
    """The first `count` photographs in colour and of at least 640x480, as JPEGs of just that size."""
    with needs_extra("server"):
        from PIL import Image, ImageOps
    folder = CACHE / "bench" / f"{VGA}-q{VGA_JPEG_QUALITY}-{count}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            fresh = Path(temporary) / "images"
            fresh.mkdir()
            for path in paths:
                with Image.open(path) as image:
                    if image.mode != "RGB" or image.width < 640 or image.height < 480:
                        continue
                    fitted = ImageOps.fit(image, (640, 480), Image.Resampling.LANCZOS)
                fitted.save(fresh / f"{path.stem}.jpg", "JPEG", quality=VGA_JPEG_QUALITY)
                if len(list(fresh.iterdir())) == count:
                    break
            with contextlib.suppress(OSError):  # another process was first
                fresh.rename(folder)
    return sorted(folder.iterdir())


def weights_of(model_path: Path, manifest: Manifest) -> Weights:
    """The weights of an exported model, so that open_clip can load the same.

    A manifest has a checkpoint's digest, and CLIP_CHECKPOINT its path. Raises ToolError if that is another file's.
    """
    if manifest.checkpoint_sha256 is None:
        return Weights(manifest.model, manifest.pretrained)
    weights = Weights(manifest.model, os.environ.get("CLIP_CHECKPOINT", ""))
    if weights.checkpoint_sha256 != manifest.checkpoint_sha256:
        raise ToolError(
            f"{model_path} was made of the checkpoint {manifest.pretrained} (sha256 "
            f"{manifest.checkpoint_sha256[:12]}...), which its vectors are compared with: set CLIP_CHECKPOINT to it",
            exit_code=2,
        )
    return weights


def ensure_model(models: Path) -> Weights:
    """The weights of the repository's `model.onnx`, exported first where it is missing or not CLIP_CHECKPOINT's.

    As in `clip-tools demo`, untrained weights are used if no hub answers: speed does not depend on the training, and
    the result says so.
    """
    model_path = models / "clip_onnx" / "1" / "model.onnx"
    if not model_path.is_file() or "CLIP_CHECKPOINT" in os.environ:
        demo.ensure_model([path.read_bytes() for path in photos.demo_photos()], output=model_path)
    manifest = Manifest.read(model_path)
    if manifest is None:
        raise ToolError(f"{model_path} has no manifest, so its weights are not known: run `clip-tools export-onnx`")
    return weights_of(model_path, manifest)


def load_workload(name: str, weights: Weights, *, count: int = 32) -> Workload:
    """The photographs with open_clip's answers.

    In another process, so that PyTorch's threads and memory do not stay in the one that measures.
    """
    paths = image_files(name, count=count)
    found = alone(reference, weights, paths)
    return Workload(name, tuple(path.read_bytes() for path in paths), found.embeddings, found.pixels)
