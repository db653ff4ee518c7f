"""The linear layers of a graph in eight bits, as a set of images has them, and what each costs; kept by content.

Layer after layer: what comes into one has passed all earlier ones in eight bits, so that it can make up for them. No
layer is fitted to the last quarter of the images: on it they are weighed, and a mix of eight-bit and FP16 layers is
chosen (export_variant.py).
"""

import hashlib
import json
import tempfile
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError
from clip_tools.export.precision import Graph
from clip_tools.paths import CACHE
from clip_tools.quantization.quantize import Eight, LayerStatistics, QuantisedLayer, fit, linear_layers, quantize
from clip_tools.quantization.stepwise import Stepwise

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Pixels = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

CALIBRATIONS = CACHE / "calibrations"
ADVISED_IMAGES, MIN_IMAGES = 500, 100
_FEWEST_IMAGES = 8  # even when forced: of these, two are left to choose a mix on
_VERSION = 7  # of what is computed below: an older result is not taken from the cache
_MOST_IMAGES = 512  # of more than these, every so many: the layers' inputs are held in memory
_HELD_OUT = 4  # one image in so many
_ROWS = 12288  # of each layer at random, in all, beside the class tokens: four times the widest layer's channels
_COST_IMAGES = 32
# Of the graph's weights; with fewer than half of them it would be no eight-bit engine (census.py). The linear layers
# that can be rounded hold nine tenths.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

_PARTS = tuple(part.name for part in fields(QuantisedLayer))  # as they are kept

Advance = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class Calibration:
    """The linear layers in eight bits by node name, and what each alone costs: 1 - mean cosine."""

    layers: dict[str, QuantisedLayer]
    costs: dict[str, float]

    def mixes(self, weights: int) -> list[dict[str, QuantisedLayer]]:
        """The layers to quantise, from all of them down to those with half of the graph's so many weights.

        Those that cost least for their size come first.
        """
        by_cost = sorted(self.costs, key=lambda name: self.costs[name] / self.layers[name].levels.size)
        held = list(accumulate((self.layers[name].levels.size for name in by_cost), initial=0))
        counts = dict.fromkeys(min(bisect_left(held, share * weights), len(by_cost)) for share in _SHARES)
        return [{name: self.layers[name] for name in self.layers if name in by_cost[:count]} for count in counts]


def check_count(images: int, *, force: bool) -> str | None:
    """A note when there are fewer images than advised. Raises ToolError under the least, which `force` lowers to 8."""
    if images < _FEWEST_IMAGES:
        raise ToolError(f"--calibration: expected at least {_FEWEST_IMAGES} images, came {images}", exit_code=2)
    if images < MIN_IMAGES and not force:
        raise ToolError(
            f"--calibration: expected at least {MIN_IMAGES} images, better {ADVISED_IMAGES}, of the kind that will be "
            f"embedded, came {images}; --force goes on with them",
            exit_code=2,
        )
    if images < ADVISED_IMAGES:
        return f"calibrating on {images} images; {ADVISED_IMAGES} or more of the kind that will be embedded are better"
    return None


def split(pixels: "Pixels") -> "tuple[Pixels, Pixels]":
    """(Images to calibrate on, images to choose on), 512 together at most.

    The latter are the last of the folder, so that shots of one moment, which stand together, are on one side. They had
    better be different photographs: crops of one stay each other's neighbours whatever rounding does to the rest.
    """
    import numpy as np

    some = pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), _MOST_IMAGES)).round().astype(int)]
    first = len(some) - len(some) // _HELD_OUT
    return some[:first], some[first:]


def calibrate(
    model: "onnx.ModelProto",
    pixels: "Pixels",
    held_out: "Pixels",
    kind: Eight,
    *,
    folder: Path = CALIBRATIONS,
    advance: Advance = lambda what, done, total: None,
) -> Calibration:
    """The calibration of a prepared FP32 graph on (N, 224, 224, 3) uint8 pixels; from the cache when all are known.

    What a layer costs is seen on the held-out images: on those that it was fitted to it costs less.
    """
    digest = hashlib.sha256(f"{_VERSION} {kind} {_ROWS} {_COST_IMAGES}".encode())
    digest.update(model.SerializeToString(deterministic=True))
    for images in (pixels, held_out):
        digest.update(f"{len(images)} ".encode())
        digest.update(images.tobytes())
    path = folder / f"{digest.hexdigest()[:24]}.npz"
    if (kept := _read(path)) is not None:
        return kept
    layers = _quantise_layers(model, pixels, kind, advance)
    made = Calibration(layers, _costs(model, layers, held_out, kind, advance))
    _keep(made, path)
    return made


def _quantise_layers(
    model: "onnx.ModelProto", pixels: "Pixels", kind: Eight, advance: Advance
) -> dict[str, QuantisedLayer]:
    """All but those with one row an image, the class token's: too few to fit to, and no work worth rounding."""
    graph, nodes, images = Graph(model), linear_layers(model), Stepwise(model, pixels)
    layers: dict[str, QuantisedLayer] = {}
    for done, node in enumerate(nodes):
        inputs = images.run_to(node, partial(quantize, layers=layers, kind=kind))
        if any(value.size != size * value.shape[-1] for value, size in zip(inputs, images.sizes, strict=True)):
            layers[node.name] = fit(watch(inputs, images.sizes), graph.array(node.input[1]), kind)
        advance("quantising the layers", done + 1, len(nodes))
    return layers


def watch(inputs: "list[Floats]", sizes: Sequence[int]) -> LayerStatistics:
    """Of what came into a layer in each batch; `sizes` are the batches' numbers of images."""
    import numpy as np

    # The axis that counts images; of (R, K) rows, which do not say which token they are, the rows'.
    first = inputs[0].ndim < 3 or all(len(value) == size for value, size in zip(inputs, sizes, strict=True))
    axis = 0 if first else 1
    centre = sum(value.sum(axis=axis, keepdims=True) for value in inputs) / sum(value.shape[axis] for value in inputs)
    random = np.random.default_rng(0)
    rows = []
    for value, size in zip(inputs, sizes, strict=True):
        varying = value - centre
        flat = varying.reshape(-1, value.shape[-1])
        wanted = min(len(flat), round(_ROWS * size / sum(sizes)))
        rows += [flat[random.choice(len(flat), wanted, replace=False)], _class_tokens(varying, size)]
    return LayerStatistics(centre, np.concatenate(rows))


def _class_tokens(value: Any, batch: int) -> Any:
    """The (batch, K) rows of the class token, of which alone the embedding is made: one in 50 or 197 rows at random.

    The layers see (token, image, K), (token x image, K) or (image, token, K), the class token first.
    """
    if value.ndim == 3 and value.shape[0] == batch:
        return value[:, 0]
    return value.reshape(-1, value.shape[-1])[:batch]


def _costs(
    model: "onnx.ModelProto", layers: dict[str, QuantisedLayer], pixels: "Pixels", kind: Eight, advance: Advance
) -> dict[str, float]:
    """1 - mean cosine of the embeddings with one layer in eight bits and all else as it was, for each layer."""
    import numpy as np

    images = Stepwise(model, pixels[:: max(1, len(pixels) // _COST_IMAGES)][:_COST_IMAGES])
    exact = images.finish()
    costs = {}
    for done, node in enumerate(node for node in linear_layers(model) if node.name in layers):
        images.run_to(node)
        got = images.finish(partial(quantize, layers={node.name: layers[node.name]}, kind=kind))
        costs[node.name] = float(1 - np.mean((got.astype(np.float64) * exact).sum(axis=1)))
        advance("weighing the layers", done + 1, len(layers))
    return costs


def _keep(made: Calibration, path: Path) -> None:
    import numpy as np

    arrays: dict[str, Any] = {"costs": np.frombuffer(json.dumps(made.costs).encode(), np.uint8)}
    arrays |= {f"{name}|{part}": getattr(layer, part) for name, layer in made.layers.items() for part in _PARTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **arrays)
    Path(file.name).replace(path)


def _read(path: Path) -> Calibration | None:
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file) as kept:
            costs = json.loads(kept["costs"].tobytes())
            parts = {name: {part: kept[f"{name}|{part}"] for part in _PARTS} for name in costs}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Calibration({name: QuantisedLayer(**found) for name, found in parts.items()}, costs)
