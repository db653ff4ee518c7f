"""The sample of an export: a few photographs or texts with open_clip's FP32 embeddings, kept beside the graph.

`serving/vector_check.py` uses it to verify a server or a new engine without open_clip and PyTorch.
"""

import itertools
import math
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.oracle import Oracle, Orientation, Weights

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FILE = "sample.npz"
PHOTOGRAPHS = 10  # at most; ours are 1.3 MB
# EXIF orientation 6, a rotated photograph, as phones write it. It tells `orientation: exif` from `ignore`.
_ON_ITS_SIDE = b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
_MOST_BYTES, _MOST_PIXELS = 8 << 20, 50_000_000  # of one photograph


@dataclass(frozen=True)
class Sample:
    """Photographs or texts with open_clip's embeddings of them, in order.

    `weights` is the architecture, and the checkpoint's sha256 or the tag. `files` are the encoded images or texts,
    `inputs` what the engine gets for them: (N, side, side, 3) uint8 RGB or (N, context) int64 tokens. `embeddings` is
    (N, D) float32 with L2 norm 1, `upright_embeddings` the same of the images rotated by their EXIF orientation; None
    for texts, and in samples of earlier versions.
    """

    weights: tuple[str, str]
    files: tuple[bytes, ...]
    inputs: "npt.NDArray[Any]"
    embeddings: "npt.NDArray[np.float32]"
    upright_embeddings: "npt.NDArray[np.float32] | None" = None

    @classmethod
    def read(cls, graph: Path) -> "Sample | None":
        """The sample beside a graph; None if it is missing or damaged."""
        import numpy as np

        try:
            with graph.with_name(FILE).open("rb") as file, np.load(file) as kept:
                sizes = kept["sizes"].cumsum()
                files = tuple(part.tobytes() for part in np.split(kept["files"], sizes[:-1]))
                model, checkpoint = kept["weights"].tolist()
                inputs = kept["pixels" if "pixels" in kept else "tokens"]
                upright = kept.get("upright_embeddings")
                found = cls((model, checkpoint), files, inputs, kept["embeddings"], upright)
        except Exception:  # a damaged archive raises many types
            return None
        return found if len(files) == len(found.inputs) == len(found.embeddings) else None

    def embeddings_of(self, orientation: Orientation) -> "npt.NDArray[np.float32] | None":
        """(N, D): open_clip's embeddings with this orientation; None if the sample has none."""
        return self.embeddings if orientation == "ignore" else self.upright_embeddings

    def write(self, graph: Path) -> None:
        """Write it beside a graph."""
        import numpy as np

        with tempfile.TemporaryDirectory(dir=graph.parent, prefix=".sample-") as folder:
            draft = Path(folder) / FILE
            np.savez(
                draft,
                weights=np.array(self.weights),
                files=np.frombuffer(b"".join(self.files), np.uint8),
                sizes=np.array([len(one) for one in self.files]),
                embeddings=self.embeddings,
                **{"pixels" if self.inputs.ndim == 4 else "tokens": self.inputs},
                **({} if self.upright_embeddings is None else {"upright_embeddings": self.upright_embeddings}),
            )
            draft.replace(graph.with_name(FILE))


def write_sample(graph: Path, weights: Weights, photographs: Iterable[bytes], oracle: Oracle) -> None:
    """Write the first of these photographs beside the graph, with the oracle's pixels and embeddings of them.

    Very large ones are skipped: every server accepts the rest. If the last one is a JPEG, it is marked as rotated.
    """
    import numpy as np

    some = tuple(itertools.islice(filter(_is_small, photographs), PHOTOGRAPHS))
    if not some:
        return
    if some[-1].startswith(b"\xff\xd8"):
        some = (*some[:-1], some[-1][:2] + _ON_ITS_SIDE + some[-1][2:])
    pixels = np.stack([oracle.pixels(one) for one in some])
    upright = replace(oracle, orientation="exif").embed(some)
    Sample(weights.identity, some, pixels, oracle.embed(some), upright).write(graph)


def _is_small(photograph: bytes) -> bool:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = math.prod(Image.open(BytesIO(photograph)).size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # over Pillow's own limit
        return False
    return len(photograph) <= _MOST_BYTES and pixels <= _MOST_PIXELS
