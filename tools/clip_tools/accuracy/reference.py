"""The embeddings that engines are compared with: open_clip's of a set of images in FP32, computed once and cached."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clip_tools.errors import ToolError
from clip_tools.oracle import Oracle, Orientation, Weights, best_device, load_oracle
from clip_tools.paths import CACHE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

REFERENCES = CACHE / "references"


@dataclass(frozen=True)
class Reference:
    """open_clip's pixels and embeddings of images, in order.

    `pixels` is (N, 224, 224, 3) uint8 RGB, `embeddings` (N, 512) float32 with L2 norm 1. `images_sha256` is one digest
    of all files in order.
    """

    names: tuple[str, ...]
    pixels: "npt.NDArray[np.uint8]"
    embeddings: "npt.NDArray[np.float32]"
    images_sha256: str


def reference(
    weights: Weights,
    paths: Sequence[Path],
    *,
    orientation: Orientation = "ignore",
    oracle: Oracle | None = None,
    folder: Path = REFERENCES,
) -> Reference:
    """open_clip's pixels and embeddings of the files, cached by weights, files and orientation.

    Raises ToolError for a file that is not an image.
    """
    import numpy as np

    if not paths:
        raise ToolError("nothing to compare on: no images were given")
    data = [path.read_bytes() for path in paths]
    images_sha256 = _digest(data)
    parts = [*weights.identity, images_sha256]
    key = json.dumps([*parts, orientation] if orientation != "ignore" else parts)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    names = tuple(path.name for path in paths)
    try:
        with np.load(path) as kept:
            return Reference(names, kept["pixels"], kept["embeddings"], images_sha256)
    except (OSError, ValueError, KeyError):  # not cached yet, or damaged
        pass
    oracle = replace(oracle or load_oracle(weights, device=best_device()), orientation=orientation)
    pixels = np.stack([_pixels(oracle, file, one) for file, one in zip(paths, data, strict=True)])
    made = Reference(names, pixels, oracle.embed(data), images_sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
        np.savez(file, pixels=made.pixels, embeddings=made.embeddings)
    Path(file.name).replace(path)
    return made


def image_pixels(oracle: Oracle, paths: Sequence[Path]) -> "npt.NDArray[np.uint8]":
    """(N, 224, 224, 3) uint8 RGB: open_clip's pixels of the files, without embedding them."""
    import numpy as np

    return np.stack([_pixels(oracle, path, path.read_bytes()) for path in paths])


def _pixels(oracle: Oracle, path: Path, data: bytes) -> "npt.NDArray[np.uint8]":
    from PIL import UnidentifiedImageError

    try:
        return oracle.pixels(data)
    except (UnidentifiedImageError, OSError) as error:
        why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise ToolError(f"{path}: expected an image, got {why}; take it out of the folder") from error


def _digest(images: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for data in images:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()
