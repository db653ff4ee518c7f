"""Verifies served vectors against open_clip's, on the sample that was kept beside the exported graph."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clip_tools.accuracy.gates import Gate, Precision, agreement, failures, gate_name, gate_of
from clip_tools.accuracy.sample import FILE, Sample
from clip_tools.errors import ToolError
from clip_tools.export.manifest import Manifest
from clip_tools.oracle import Orientation
from clip_tools.repository import Model, engine_of
from clip_tools.serving.engine import Engine, has_exact_pixels, orientation_of, precision_of_engine, unchanged_graph_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CHECK_VECTORS_VARIABLE = "CLIP_CHECK_VECTORS"  # 0 turns the check off
NOT_VERIFIED = "the vectors were not verified against open_clip"


class WrongVectors(ToolError):
    """The served vectors are below the gate of their precision."""


def check_vectors(
    engine: Engine, embed: "Callable[[Sample], npt.NDArray[np.float32]]", *, on_pixels: bool = False
) -> str:
    """One line: how close the vectors of `embed` are to open_clip's, or why they were not verified.

    `on_pixels`: they are made from the sample's pixels, which are open_clip's, and not from its files by `preprocess`.
    Raises WrongVectors if the worst cosine is below the gate of the engine's precision.
    """
    exact = on_pixels or has_exact_pixels(engine)
    orientation: Orientation = "ignore" if on_pixels else orientation_of(engine)
    precision_in = partial(precision_of_engine, engine)
    return _check(engine.model_file, engine.title, precision_in, embed, exact_pixels=exact, orientation=orientation)


def check_text_vectors(texts: Sequence[Model], embed: "Callable[[Sample], npt.NDArray[np.float32]]") -> str:
    """The same for a deployment of the text tower. Raises WrongVectors."""
    return _check(engine_of(texts).file, texts[-1].name, lambda made: made.precision, embed, exact_pixels=True)


def _check(
    file: Path | None,
    title: str,
    precision_in: Callable[[Manifest], Precision],
    embed: "Callable[[Sample], npt.NDArray[np.float32]]",
    *,
    exact_pixels: bool,
    orientation: Orientation = "ignore",
) -> str:
    known = unchanged_graph_of(file) if file else None
    if file is None or known is None:
        return f"{NOT_VERIFIED}: the graph of {file} or its manifest is missing"
    graph, made = known
    sample = Sample.read(graph)
    expected = sample.embeddings_of(orientation) if sample and sample.weights == made.identity else None
    if sample is None or expected is None:
        return (
            f"{NOT_VERIFIED}: {graph.resolve().parent} has no {FILE} of these weights, which `clip-tools export-onnx` "
            f"writes: export {made.model}, {made.pretrained}, again"
        )
    precision = precision_in(made)
    gate, of_gate = gate_of(precision, exact_pixels=exact_pixels), gate_name(precision, exact_pixels=exact_pixels)
    what = "photographs" if sample.inputs.ndim == 4 else "texts"
    found = agreement(embed(sample), expected)
    # Only the worst cosine: ten images are too few for the mean and the neighbours (`trained=False` leaves them out).
    if under := failures(found, Gate(gate.worst_cosine), trained=False):
        raise WrongVectors(
            f"the vectors of {title} do not match open_clip's: {'; '.join(under)}, the gate of {of_gate}, on "
            f"{found.images} {what}. Make {file.resolve()} again or use another engine; `clip-tools verify` shows "
            f"more; {CHECK_VECTORS_VARIABLE}=0 serves it anyway"
        )
    return (
        f"the vectors match open_clip's: worst cosine {found.worst_cosine:.5f} on {found.images} {what} "
        f"({of_gate}: at least {gate.worst_cosine})"
    )
