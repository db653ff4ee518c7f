"""Quantises a graph's linear layers to eight bits on a set of images, and measures what each costs; cached by content.

Layers are quantised one after the other: a layer's input has passed all earlier layers in eight bits, so that it can
correct their errors. The last quarter of the images is held out: on it the costs are measured, and lower_precision.py
chooses the layers that stay in FP16.
"""

import hashlib
import json
import tempfile
import zipfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.errors import ToolError
from clip_tools.export.precision import Graph
from clip_tools.paths import CACHE
from clip_tools.progress import Tell, silent
from clip_tools.quantization.quantize import EightBit, LayerStatistics, QuantisedLayer, fit, linear_layers, quantize
from clip_tools.quantization.stepwise import Stepwise

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    Pixels = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

CALIBRATIONS = CACHE / "calibrations"
ADVISED_IMAGES, MIN_IMAGES = 500, 100
_FEWEST_IMAGES = 8  # even with --force: two of them are held out, to choose a mix
_VERSION = 7  # of the computation below; the cache ignores results of other versions
_MOST_IMAGES = 512  # more are sampled evenly, because the layers' inputs stay in memory
_HELD_OUT = 4  # one image in this many
_ROWS = 12288  # random ones of each layer, beside the class tokens: four times the widest layer's channels
_COST_IMAGES = 32
# Shares of the graph's weights to try; with less than half it is no eight-bit engine (census.py). The layers that can
# be quantised have nine tenths of the weights.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

_PARTS = tuple(part.name for part in fields(QuantisedLayer))  # a layer's arrays in the cache


@dataclass(frozen=True)
class Calibration:
    """The linear layers in eight bits by node name, and the cost of each one alone: 1 - mean cosine."""

    layers: dict[str, QuantisedLayer]
    costs: dict[str, float]

    def mixes(self, weights: int) -> list[dict[str, QuantisedLayer]]:
        """Sets of layers to quantise, from all of them down to half of the graph's `weights`, a number.

        The layers with the lowest cost for their size are quantised first.
        """
        by_cost = sorted(self.costs, key=lambda name: self.costs[name] / self.layers[name].levels.size)
        cumulative = list(accumulate((self.layers[name].levels.size for name in by_cost), initial=0))
        counts = dict.fromkeys(min(bisect_left(cumulative, share * weights), len(by_cost)) for share in _SHARES)
        return [{name: self.layers[name] for name in self.layers if name in by_cost[:count]} for count in counts]


def check_count(images: int, *, force: bool) -> str | None:
    """A note if there are fewer images than advised. Raises ToolError below the minimum, which `force` lowers to 8."""
    if images < _FEWEST_IMAGES:
        raise ToolError(f"--calibration: expected at least {_FEWEST_IMAGES} images, got {images}", exit_code=2)
    if images < MIN_IMAGES and not force:
        raise ToolError(
            f"--calibration: expected at least {MIN_IMAGES} images, better {ADVISED_IMAGES}, of the kind that will be "
            f"embedded, got {images}; --force goes on with them",
            exit_code=2,
        )
    if images < ADVISED_IMAGES:
        return f"calibrating on {images} images; {ADVISED_IMAGES} or more of the kind that will be embedded are better"
    return None


def split(pixels: "Pixels") -> "tuple[Pixels, Pixels]":
    """(Images to calibrate on, held-out images), at most 512 together.

    The last images are held out, so that shots of one moment, which are neighbours in a folder, are on one side. They
    should be different photographs: crops of one stay each other's neighbours whatever the rounding.
    """
    import numpy as np

    some = pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), _MOST_IMAGES)).round().astype(int)]
    first = len(some) - len(some) // _HELD_OUT
    return some[:first], some[first:]


def calibrate(
    model: "onnx.ModelProto",
    pixels: "Pixels",
    held_out: "Pixels",
    kind: EightBit,
    *,
    folder: Path = CALIBRATIONS,
    tell: Tell = silent,
) -> Calibration:
    """The calibration of a prepared FP32 graph on (N, 224, 224, 3) uint8 pixels, cached by graph and images.

    The costs are measured on the held-out images: on images that a layer was fitted to they are lower.
    """
    digest = hashlib.sha256(f"{_VERSION} {kind} {_ROWS} {_COST_IMAGES}".encode())
    digest.update(model.SerializeToString(deterministic=True))
    for images in (pixels, held_out):
        digest.update(f"{len(images)} ".encode())
        digest.update(images.tobytes())
    path = folder / f"{digest.hexdigest()[:24]}.npz"
    if (kept := _read(path)) is not None:
        return kept
    layers = _quantise_layers(model, pixels, kind, tell)
    made = Calibration(layers, _costs(model, layers, held_out, kind, tell))
    _keep(made, path)
    return made


def _quantise_layers(
    model: "onnx.ModelProto", pixels: "Pixels", kind: EightBit, tell: Tell
) -> dict[str, QuantisedLayer]:
    """All linear layers in eight bits but those with one row for each image, the class token's.

    Those have too few rows to fit to, and too little work to save.
    """
    graph, nodes, images = Graph(model), linear_layers(model), Stepwise(model, pixels)
    layers: dict[str, QuantisedLayer] = {}
    for done, node in enumerate(nodes):
        inputs = images.run_to(node, partial(quantize, layers=layers, kind=kind))
        if any(value.size != size * value.shape[-1] for value, size in zip(inputs, images.sizes, strict=True)):
            layers[node.name] = fit(layer_statistics(inputs, images.sizes), graph.array(node.input[1]), kind)
        tell("quantising the layers", done + 1, len(nodes))
    return layers


def layer_statistics(inputs: "list[Floats]", sizes: Sequence[int]) -> LayerStatistics:
    """The statistics of a layer's input, given by batch; `sizes` are the numbers of images in the batches."""
    import numpy as np

    # The axis of the images. Rows of shape (R, K) do not tell tokens apart, so theirs is the axis of the rows.
    first = inputs[0].ndim < 3 or all(len(value) == size for value, size in zip(inputs, sizes, strict=True))
    axis = 0 if first else 1
    centre = sum(value.sum(axis=axis, keepdims=True) for value in inputs) / sum(value.shape[axis] for value in inputs)
    random = np.random.default_rng(0)
    rows = []
    for value, size in zip(inputs, sizes, strict=True):
        varying = value - centre
        flat = varying.reshape(-1, value.shape[-1])
        count = min(len(flat), round(_ROWS * size / sum(sizes)))
        rows += [flat[random.choice(len(flat), count, replace=False)], _class_tokens(varying, size)]
    return LayerStatistics(centre, np.concatenate(rows))


def _class_tokens(value: Any, batch: int) -> Any:
    """The (batch, K) rows of the class token, which alone becomes the embedding and is only one row in 50 or 197.

    The layers' inputs are (token, image, K), (token x image, K) or (image, token, K), with the class token first.
    """
    if value.ndim == 3 and value.shape[0] == batch:
        return value[:, 0]
    return value.reshape(-1, value.shape[-1])[:batch]


def _costs(
    model: "onnx.ModelProto", layers: dict[str, QuantisedLayer], pixels: "Pixels", kind: EightBit, tell: Tell
) -> dict[str, float]:
    """1 - mean cosine of the embeddings with one layer in eight bits and the others unchanged, for each layer."""
    import numpy as np

    images = Stepwise(model, pixels[:: max(1, len(pixels) // _COST_IMAGES)][:_COST_IMAGES])
    exact = images.finish()
    costs = {}
    for done, node in enumerate(node for node in linear_layers(model) if node.name in layers):
        images.run_to(node)
        got = images.finish(partial(quantize, layers={node.name: layers[node.name]}, kind=kind))
        costs[node.name] = float(1 - np.mean((got.astype(np.float64) * exact).sum(axis=1)))
        tell("measuring the layers", done + 1, len(layers))
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
