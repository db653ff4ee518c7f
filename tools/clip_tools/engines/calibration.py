"""What flows through the linear layers on a set of images, and the scales and the mix that follow; kept by content."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.engines.onnx_runner import run_onnx
from clip_tools.engines.precision import Graph
from clip_tools.engines.quantize import Eight, LayerScales, LayerStatistics, fit, linear_layers, quantize
from clip_tools.errors import ToolError
from clip_tools.paths import CACHE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

CALIBRATIONS = CACHE / "calibrations"
ADVISED_IMAGES, MIN_IMAGES = 500, 100
_VERSION = 3  # of what is computed below: an older result is not taken from the cache
_BATCH = 8
_ROWS = 384  # of each layer at random, in all, beside the class tokens
_SENSITIVITY_IMAGES = 24
# Of the linear layers; fewer than half of all products with weights would be no eight-bit engine (census.py).
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.53)

Advance = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class Calibration:
    """Scales of every linear layer by node name, and what each alone costs: 1 - mean cosine, on calibration images."""

    layers: dict[str, LayerScales]
    costs: dict[str, float]

    def mixes(self) -> Iterator[dict[str, LayerScales]]:
        """The layers to quantise, from all of them down to the cheapest half."""
        by_cost = sorted(self.costs, key=lambda name: self.costs[name])
        for share in _SHARES:
            chosen = set(by_cost[: max(1, round(share * len(by_cost)))])
            yield {name: scales for name, scales in self.layers.items() if name in chosen}


def check_count(images: int, *, force: bool) -> str | None:
    """A note when there are fewer images than advised. Raises ToolError under the least, unless forced."""
    if images < MIN_IMAGES and not force:
        raise ToolError(
            f"--calibration: expected at least {MIN_IMAGES} images, better {ADVISED_IMAGES}, of the kind that will be "
            f"embedded, came {images}; --force goes on with them",
            exit_code=2,
        )
    if images < ADVISED_IMAGES:
        return f"calibrating on {images} images; {ADVISED_IMAGES} or more of the kind that will be embedded are better"
    return None


def calibrate(
    model: "onnx.ModelProto",
    pixels: "npt.NDArray[np.uint8]",
    kind: Eight,
    *,
    folder: Path = CALIBRATIONS,
    advance: Advance = lambda what, done, total: None,
) -> Calibration:
    """The calibration of a prepared FP32 graph on (N, 224, 224, 3) uint8 pixels; from the cache when both are known."""
    digest = hashlib.sha256(f"{_VERSION} {kind} {_ROWS} {_SENSITIVITY_IMAGES}".encode())
    digest.update(model.SerializeToString(deterministic=True))
    digest.update(pixels.tobytes())
    path = folder / f"{digest.hexdigest()[:24]}.npz"
    if (kept := _read(path)) is not None:
        return kept
    statistics = collect(model, pixels, advance=advance)
    graph = Graph(model)
    layers = {}
    nodes = linear_layers(model)
    for index, node in enumerate(nodes):
        layers[node.name] = fit(statistics[node.name], graph.array(node.input[1]), kind)
        advance("choosing scales", index + 1, len(nodes))
    costs = _costs(model, layers, pixels, kind, advance)
    made = Calibration(layers, costs)
    _keep(made, path)
    return made


def collect(
    model: "onnx.ModelProto", pixels: "npt.NDArray[np.uint8]", *, advance: Advance = lambda what, done, total: None
) -> dict[str, LayerStatistics]:
    """What comes into each linear layer, by node name."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    nodes = linear_layers(model)
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: dict[str, list[Any]] = {name: [] for name in inputs}
    ranges: dict[str, tuple[Any, Any]] = {}
    random = np.random.default_rng(0)
    take = max(1, round(_ROWS * _BATCH / len(pixels)))
    for start in range(0, len(pixels), _BATCH):
        batch = pixels[start : start + _BATCH]
        for name, value in zip(inputs, session.run(inputs, {"pixels": batch}), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            least, largest = ranges.get(name, (rows[0], rows[0]))
            ranges[name] = np.minimum(least, rows.min(axis=0)), np.maximum(largest, rows.max(axis=0))
            found[name].append(rows[random.choice(len(rows), min(take, len(rows)), replace=False)])
            found[name].append(_class_tokens(value, len(batch)))
        advance("watching the layers", start + len(batch), len(pixels))
    return {node.name: LayerStatistics(*ranges[node.input[0]], np.concatenate(found[node.input[0]])) for node in nodes}


def _class_tokens(value: Any, batch: int) -> Any:
    """The (batch, K) rows of the class token, of which alone the embedding is made: one in 50 or 197 rows at random.

    The layers see (token, image, K), (token x image, K) or (image, token, K), the class token first.
    """
    if value.ndim == 3 and value.shape[0] == batch:
        return value[:, 0]
    return value.reshape(-1, value.shape[-1])[:batch]


def _costs(
    model: "onnx.ModelProto",
    layers: dict[str, LayerScales],
    pixels: "npt.NDArray[np.uint8]",
    kind: Eight,
    advance: Advance,
) -> dict[str, float]:
    import numpy as np

    some = pixels[:: max(1, len(pixels) // _SENSITIVITY_IMAGES)][:_SENSITIVITY_IMAGES]
    exact = run_onnx(model, some).embeddings
    costs = {}
    for index, (name, scales) in enumerate(layers.items()):
        got = run_onnx(quantize(model, {name: scales}, kind), some).embeddings
        costs[name] = float(1 - np.mean((got * exact).sum(axis=1)))
        advance("weighing the layers", index + 1, len(layers))
    return costs


def _keep(made: Calibration, path: Path) -> None:
    import numpy as np

    arrays: dict[str, Any] = {"costs": np.frombuffer(json.dumps(made.costs).encode(), np.uint8)}
    for name, scales in made.layers.items():
        for part in ("shift", "smooth", "scale", "weight_scales", "bias"):
            arrays[f"{name}|{part}"] = np.asarray(getattr(scales, part))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **arrays)
    Path(file.name).replace(path)


def _read(path: Path) -> Calibration | None:
    import numpy as np

    try:
        with np.load(path) as kept:
            costs = json.loads(kept["costs"].tobytes())
            layers = {
                name: LayerScales(
                    kept[f"{name}|shift"],
                    kept[f"{name}|smooth"],
                    float(kept[f"{name}|scale"]),
                    kept[f"{name}|weight_scales"],
                    kept[f"{name}|bias"],
                )
                for name in costs
            }
    except (OSError, ValueError, KeyError):
        return None
    return Calibration(layers, costs)
