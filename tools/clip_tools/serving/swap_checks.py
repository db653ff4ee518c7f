"""The checks of `clip-tools swap`: whether the engine and the ensembles embed, and match open_clip."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clip_tools.accuracy.sample import Sample
from clip_tools.errors import ToolError
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, Model
from clip_tools.serving.engine import Engine
from clip_tools.serving.model_control import ModelControl, ServerFullError
from clip_tools.serving.probe import PROBE_TEXT, probe_image, retry_while_full
from clip_tools.serving.vector_check import check_text_vectors, check_vectors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Detects other weights; the gates of `clip-tools verify` check the precision. On the probe, BF16 has cosine 0.9998 to
# FP32 (ViT-B-32 shape, OpenAI's weights), and other weights -0.07.
MIN_COSINE_OF_SAME_WEIGHTS = 0.8
_ROOM_LIMIT_S = 60.0  # for each request to a busy server


def probe_pixels(side: int = 224) -> "npt.NDArray[np.uint8]":
    """Two different images, (2, side, side, 3) uint8 RGB: a colour gradient, and its mirror image."""
    import numpy as np

    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    image = np.stack([across, down, 255 - across], axis=-1)
    return np.stack([image, image[:, ::-1]])


def embed_probe(control: ModelControl, engine: str) -> "npt.NDArray[np.float32]":
    """The engine's vectors of `probe_pixels`."""
    side = control.configuration(engine).input[0].dims[0]
    return _answers(partial(control.embed_pixels, engine, pixels[None]) for pixels in probe_pixels(side))


def check_engine(control: ModelControl, engine: str, like: "npt.NDArray[np.float32] | None") -> None:
    """Raises ToolError unless the engine gives unit vectors for two images; with `like`, those of the same weights."""
    import numpy as np

    got = embed_probe(control, engine)
    if got.ndim != 2 or len(got) != 2 or not np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-2):
        raise ToolError(f"{engine}: expected two unit vectors, got {got.shape}, norm {np.linalg.norm(got):.3f}")
    cosine = 1.0 if like is None else float((got * like).sum(axis=1).min()) if got.shape == like.shape else 0.0
    if cosine < MIN_COSINE_OF_SAME_WEIGHTS:
        raise ToolError(
            f"{engine} was built from other weights: its vectors have cosine {cosine:.2f} to those served now, and an "
            "index must not mix them; build it from the same export, or give --allow-other-weights"
        )


def check_ensemble(control: ModelControl) -> None:
    """Raises ToolError unless the ensemble gives a unit vector for an image."""
    _check_answer(ENSEMBLE, partial(control.embed_image, probe_image()))


def check_text_ensemble(control: ModelControl) -> None:
    """Raises ToolError unless the text ensemble gives a unit vector for a text."""
    _check_answer(TEXT_ENSEMBLE, partial(control.embed_text, PROBE_TEXT.encode()))


def verify_engine(control: ModelControl, models: Path, name: str, engine: str) -> str:
    """The result of `check_vectors` for the engine alone, on the sample's pixels. Raises WrongVectors."""

    def embed(sample: Sample) -> "npt.NDArray[np.float32]":
        return _answers(partial(control.embed_pixels, engine, pixels[None]) for pixels in sample.inputs)

    return check_vectors(Engine(models=models, config_name=name), embed, on_pixels=True)


def verify_ensemble(control: ModelControl, models: Path, name: str) -> str:
    """The result of `check_vectors` for the whole ensemble. Raises WrongVectors."""

    def embed(sample: Sample) -> "npt.NDArray[np.float32]":
        return _answers(partial(control.embed_image, image) for image in sample.files)

    return check_vectors(Engine(models=models, config_name=name), embed)


def verify_text_ensemble(control: ModelControl, texts: Sequence[Model]) -> str:
    """The result of `check_text_vectors`. Raises WrongVectors."""

    def embed(sample: Sample) -> "npt.NDArray[np.float32]":
        return _answers(partial(control.embed_text, text) for text in sample.files)

    return check_text_vectors(texts, embed)


def _check_answer(model: str, ask: "Callable[[], npt.NDArray[np.float32]]") -> None:
    import numpy as np

    got = _answers([ask])
    if got.ndim != 2 or len(got) != 1 or not np.isclose(np.linalg.norm(got), 1, atol=1e-2):
        raise ToolError(f"{model}: expected a unit vector, got {got.shape}, norm {np.linalg.norm(got):.3f}")


def _answers(questions: "Iterable[Callable[[], npt.NDArray[np.float32]]]") -> "npt.NDArray[np.float32]":
    """All answers, to one image or text at a time: an engine may have no batches. Retries while the server is full."""
    import numpy as np

    return np.concatenate([retry_while_full(ask, (ServerFullError,), limit_s=_ROOM_LIMIT_S) for ask in questions])
