"""`clip-tools tune-precision`: finds the fastest mix of FP32 and BF16 layers on this CPU that passes an accuracy gate.

It measures what will be served: the graph cut into parts, each opened by `backends/onnxruntime` with OpenVINO in its
own precision. A layer's cost is the loss of cosine to open_clip with that layer alone in BF16; its gain is the time
that BF16 saves. Layers move to BF16 in the order of cost for gain, as many as the gate allows, found by bisection.
Neighbouring layers of one precision form one part, because a border costs a conversion.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools.accuracy.gates import Agreement, agreement, cosines, counts_for_nothing
from clip_tools.accuracy.reference import Reference
from clip_tools.digest import files_of
from clip_tools.errors import ToolError
from clip_tools.export.manifest import is_exported
from clip_tools.export.mix import BATCH, LayeredGraph, Mix, PartPrecision
from clip_tools.oracle import Weights
from clip_tools.progress import Tell, silent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

WORST_COSINE = 0.999
WORTH = 1.25  # times FP32: below it a mix is not worth another configuration
ROUNDS = 15
_LAYER_ROUNDS = 5
_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LayerCost:
    """One layer alone in BF16: a batch's time in both precisions, and `cost`, 1 - worst cosine."""

    name: str
    fp32_ms: float
    bf16_ms: float
    cost: float

    @property
    def saved_ms(self) -> float:
        """The time that BF16 saves for a batch."""
        return self.fp32_ms - self.bf16_ms

    @property
    def price(self) -> float:
        """The cost of each saved millisecond; infinite if none is saved."""
        return self.cost / self.saved_ms if self.saved_ms > 0 else float("inf")


@dataclass(frozen=True)
class Tuning:
    """The measured layers and mixes."""

    layers: tuple[LayerCost, ...]
    mixes: tuple[Mix, ...]
    worst_cosine: float

    @property
    def best(self) -> Mix | None:
        """The fastest mix that passes the gate and is `WORTH` times as fast as FP32; None if there is none."""
        good = [mix for mix in self.mixes if mix.agreement.worst_cosine >= self.worst_cosine and mix.ratio >= WORTH]
        return max(good, key=lambda mix: mix.ratio, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each mix with the count of its BF16 layers, and whether it is the best."""
        mixes = []
        for mix in self.mixes:
            found = {"lowered": mix.lowered, **asdict(mix), "best": mix == self.best}
            found["precisions"] = " ".join(mix.precisions)
            mixes.append(found)
        return {
            "gate": {"worst_cosine": self.worst_cosine, "worth": WORTH},
            "batch": BATCH,
            "layers": [asdict(layer) for layer in self.layers],
            "mixes": mixes,
        }


def tune(
    model: "onnx.ModelProto",
    expected: Reference,
    *,
    worst_cosine: float = WORST_COSINE,
    rounds: int = ROUNDS,
    tell: Tell = silent,
) -> Tuning:
    """Measure the layers and the mixes of an FP32 graph against open_clip's embeddings of `expected.pixels`.

    Raises ToolError if the graph does not agree in FP32, as with other weights.
    """
    with tempfile.TemporaryDirectory(prefix="clip-tune-") as folder:
        trial = _Trial(LayeredGraph(model, Path(folder)), expected, tell)
        count = trial.count
        if not (as_it_is := trial.worst_cosine([])) >= worst_cosine:
            raise ToolError(f"the graph's worst cosine to open_clip is {as_it_is:.5f} in FP32: is it of these weights?")
        passes = trial.worst_cosine(range(count)) >= worst_cosine
        costs = _costs(trial.graph, trial.most_sensitive(), tell)
        order = [i for i in sorted(range(count), key=lambda i: costs[i].price) if costs[i].saved_ms > 0]
        if passes:
            for share in _SHARES:  # all layers pass; these are for the curve
                trial.worst_cosine(order[: round(share * len(order))])
        else:
            fits, fails = 0, len(order) + 1
            while fails - fits > 1:
                middle = (fits + fails) // 2
                fine = trial.worst_cosine(order[:middle]) >= worst_cosine
                fits, fails = (middle, fails) if fine else (fits, middle)
        return Tuning(tuple(costs), trial.timed(rounds), worst_cosine)


class _Trial:
    """Compares each mix with open_clip once, and times all at the end; at most two sessions are open at a time."""

    def __init__(self, graph: LayeredGraph, expected: Reference, tell: Tell) -> None:
        self.graph, self.count = graph, len(graph.layers)
        self._expected, self._tell = expected, tell
        self._embeddings: dict[tuple[PartPrecision, ...], Any] = {}

    def worst_cosine(self, lowered: Sequence[int]) -> float:
        """The worst cosine of the mix with these layers in BF16."""
        mix = self._precisions(lowered)
        if mix not in self._embeddings:
            self._embeddings[mix] = embed(self.graph.open(mix), self._expected.pixels)
        self._tell("comparing mixes", len(self._embeddings), 2 + max(len(_SHARES), self.count.bit_length()))
        return self._agreement(mix).worst_cosine

    def most_sensitive(self) -> Reference:
        """The batch of photographs with the lowest cosines when every layer is in BF16: a mix fails on these first."""
        import numpy as np

        cosine = cosines(self._embeddings[self._precisions(range(self.count))], self._expected.embeddings)
        worst = np.sort(np.argsort(cosine)[:BATCH])
        names = tuple(self._expected.names[i] for i in worst)
        return Reference(names, self._expected.pixels[worst], self._expected.embeddings[worst], "")

    def timed(self, rounds: int) -> tuple[Mix, ...]:
        """Every mix so far with its speed relative to FP32, those with the fewest BF16 layers first."""
        batch = self._expected.pixels[:BATCH]
        plain = self.graph.open(self._precisions([]))
        made = []
        for mix in sorted(self._embeddings, key=lambda mix: mix.count("bf16")):
            pairs = times(plain, self.graph.open(mix), batch, rounds)
            ratios = [slow / fast for slow, fast in pairs]
            made.append(
                Mix(
                    precisions=mix,
                    parts=len(self.graph.parts(mix)[1]),
                    agreement=self._agreement(mix),
                    ratio=round(statistics.median(ratios), 3),
                    ratio_lowest=round(min(ratios), 3),
                    ratio_highest=round(max(ratios), 3),
                    images_per_s=round(len(batch) / statistics.median(fast for _, fast in pairs), 2),
                )
            )
            self._tell("timing mixes", len(made), len(self._embeddings))
        return tuple(made)

    def _agreement(self, mix: tuple[PartPrecision, ...]) -> Agreement:
        return agreement(self._embeddings[mix], self._expected.embeddings)

    def _precisions(self, lowered: Sequence[int]) -> tuple[PartPrecision, ...]:
        chosen = set(lowered)
        return tuple("bf16" if index in chosen else "fp32" for index in range(self.count))


def embed(session: Any, pixels: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.float32]":
    """(N, 512) float32 embeddings of (N, 224, 224, 3) uint8 pixels, in batches."""
    import numpy as np

    batches = range(0, len(pixels), BATCH)
    return np.concatenate([session.run(["embedding"], {"pixels": pixels[i : i + BATCH]})[0] for i in batches])


def times(one: Any, other: Any, pixels: "npt.NDArray[np.uint8]", rounds: int) -> list[tuple[float, float]]:
    """The seconds of both sessions for one batch, in turn, so that other load affects both. A first round warms up."""
    pairs = []
    for _ in range(rounds + 1):
        pair = []
        for session in (one, other):
            begin = time.perf_counter()
            session.run(["embedding"], {"pixels": pixels})
            pair.append(time.perf_counter() - begin)
        pairs.append((pair[0], pair[1]))
    return pairs[1:]


def _costs(graph: LayeredGraph, most_sensitive: Reference, tell: Tell) -> list[LayerCost]:
    """The cost of each layer alone in BF16, on these photographs as one batch."""
    import numpy as np

    alone = graph.single_layers()
    steps = [graph.open_parts([part], ["fp32"]) for part in alone]
    exact: dict[str, Any] = {"pixels": most_sensitive.pixels}
    for step in steps:
        exact |= _run(step, exact)
    found = []
    for index, (layer, part) in enumerate(zip(graph.layers, alone, strict=True)):
        fp32_ms, bf16_ms, made = _time_both(steps[index], graph.open_parts([part], ["bf16"]), exact)
        tensors = exact | made
        for step in steps[index + 1 :]:
            tensors |= _run(step, tensors)
        worst = float(np.nan_to_num(cosines(tensors["embedding"], most_sensitive.embeddings), nan=-1.0).min())
        found.append(LayerCost(layer.name, fp32_ms, bf16_ms, float(f"{max(0.0, 1 - worst):.3g}")))
        tell("measuring the layers", index + 1, len(steps))
    return found


def _time_both(plain: Any, low: Any, tensors: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """(ms in FP32, ms in BF16, the outputs in BF16). The lowest time of the rounds, because other load only adds."""
    spent: dict[int, list[float]] = {0: [], 1: []}
    made: dict[str, Any] = {}
    for _ in range(1 + _LAYER_ROUNDS):
        for which, session in enumerate((plain, low)):
            begin = time.perf_counter()
            made = _run(session, tensors)
            spent[which].append(1000 * (time.perf_counter() - begin))
    return round(min(spent[0][1:]), 3), round(min(spent[1][1:]), 3), made


def _run(session: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The outputs of one part by name, from the tensors that it reads."""
    names = [tensor.name for tensor in session.get_outputs()]
    feeds = {tensor.name: tensors[tensor.name] for tensor in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def tune_precision(
    model_path: Path,
    weights: Weights,
    expected: Reference,
    *,
    worst_cosine: float = WORST_COSINE,
    rounds: int = ROUNDS,
    tell: Tell = silent,
) -> tuple[Tuning, dict[str, Any]]:
    """(The tuning of an exported FP32 graph, its fields of the result file).

    Raises ToolError if the file is not the export of these weights.
    """
    import onnx

    if not is_exported(model_path, weights):
        raise ToolError(
            f"{model_path} is not this version's export of {weights.model}, {weights.pretrained}: make it with "
            f"`clip-tools export-onnx --model {weights.model} --pretrained {weights.pretrained}`"
        )
    if len(files_of(model_path)) > 1:
        raise ToolError(f"{model_path}: expected a graph in one file, got one with external data")
    tuning = tune(onnx.load(str(model_path)), expected, worst_cosine=worst_cosine, rounds=rounds, tell=tell)
    trained = weights.seed is None
    result = {
        "kind": "tune-precision",
        "weights": {"model": weights.model, "trained": trained},
        "photographs": {"count": len(expected.pixels), "sha256": expected.images_sha256},
        "counts_for_nothing": counts_for_nothing(len(expected.pixels), trained=trained),
        **tuning.to_dict(),
    }
    return tuning, result
