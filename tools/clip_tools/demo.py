"""`clip-tools demo`: photographs to embeddings through the real server, shown so that a person can judge them."""

import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools import photos
from clip_tools.engines.export_onnx import Manifest, export_onnx, is_exported
from clip_tools.engines.export_text import export_text
from clip_tools.errors import missing_extra
from clip_tools.oracle import DEFAULT_MODEL, OtherTokenizer, Weights, WeightsUnavailable, load_oracle
from clip_tools.paths import CACHE, ROOT
from clip_tools.serving.serve import EmbeddedServer, ServeOptions, check_ports

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PICTURE = CACHE / "demo" / "similarity.png"
LOG = CACHE / "demo" / "tritonserver.log"

UNTRAINED = (
    "UNTRAINED WEIGHTS (random:0): no model hub answered, so the vectors below are real in every way but meaning. "
    "For trained ones: .venv/bin/clip-tools export-onnx --pretrained PATH"
)


def weights_from_environment() -> Weights:
    """CLIP_MODEL and CLIP_CHECKPOINT where they are set, else the default model and tag."""
    checkpoint = os.environ.get("CLIP_CHECKPOINT")
    model = os.environ.get("CLIP_MODEL", DEFAULT_MODEL)
    return Weights(model, checkpoint) if checkpoint else Weights(model)


def ensure_model(photographs: Sequence[bytes], output: Path) -> Manifest:
    """The manifest of the model to show: the one that is there when it will do, else a fresh export.

    A trained model that is there stays, unless CLIP_CHECKPOINT asks for another. Only here, and only when no hub
    answers, untrained weights take the place of the default.
    """
    weights = weights_from_environment()
    present = Manifest.read(output) if output.is_file() else None
    asked = "CLIP_CHECKPOINT" in os.environ
    if present and (is_exported(output, weights) if asked else present.trained):
        return present
    try:
        return _export(weights, photographs, output)
    except WeightsUnavailable:
        if asked:
            raise
    untrained = Weights(weights.model, "random:0")
    if present and is_exported(output, untrained):
        return present
    return _export(untrained, photographs, output)


def _export(weights: Weights, photographs: Sequence[bytes], output: Path) -> Manifest:
    """Both towers, where the model's tokenizer is one that is served; of different weights they would not start."""
    oracle = load_oracle(weights)
    manifest = export_onnx(weights, photographs, output, oracle=oracle)
    with contextlib.suppress(OtherTokenizer):
        export_text(weights, output.parents[2] / "clip_text_onnx" / "1" / "model.onnx", oracle=oracle)
    return manifest


def similarity_table(names: Sequence[str], embeddings: "npt.NDArray[np.float32]") -> Any:
    """The cosine of each photograph with each, as a rich table."""
    from rich.table import Table

    table = Table(title="Similarity (cosine)", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, embeddings @ embeddings.T, strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in row))
    return table


def draw_heat_map(
    paths: Sequence[Path], embeddings: "npt.NDArray[np.float32]", picture: Path, *, subtitle: str
) -> None:
    """Draw the similarities as a PNG heat map with the photographs' thumbnails on both axes."""
    try:
        import matplotlib as mpl
        import numpy as np
        from matplotlib.figure import Figure
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage
        from PIL import Image
    except ImportError as error:
        raise missing_extra("server", error) from error
    similarities = embeddings @ embeddings.T
    count = len(paths)
    figure = Figure(figsize=(1.0 * count + 2.6, 1.0 * count + 2.2), layout="constrained")
    axes = figure.add_subplot()
    others = similarities[~np.eye(count, dtype=bool)]
    image = axes.imshow(similarities, cmap="viridis", vmin=float(others.min()), vmax=float(others.max()))
    middle = (float(others.min()) + float(others.max())) / 2
    for row, column in itertools.product(range(count), repeat=2):
        value = similarities[row, column]
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white", size=11
        )
    names = [path.stem for path in paths]
    axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names)
    axes.tick_params(axis="x", pad=62, length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="y", pad=66, length=0)
    for index, path in enumerate(paths):
        with Image.open(path) as photograph:
            thumbnail = photograph.convert("RGB")
            thumbnail.thumbnail((112, 112))
        for where in ((index, -0.5), (-0.5, index)):
            offset = (0, 34) if where[1] == -0.5 else (-36, 0)
            axes.add_artist(
                AnnotationBbox(
                    OffsetImage(np.asarray(thumbnail), zoom=0.5),
                    where,
                    xybox=offset,
                    boxcoords="offset points",
                    frameon=False,
                    annotation_clip=False,
                )
            )
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine similarity")
    axes.set_title(subtitle, loc="left", size=10, pad=86)
    with mpl.rc_context({"savefig.dpi": 110}):
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)


def demo(options: ServeOptions, *, picture: Path) -> None:
    """Export when needed, serve, embed the demo photographs over gRPC, show what came back, stop."""
    try:
        from rich.console import Console

        from clip_embed import EmbeddingClient
    except ImportError as error:
        raise missing_extra("server", error) from error
    check_ports(options)
    talk, data = Console(stderr=True), Console(soft_wrap=True)
    with talk.status("taking the photographs out of their packages"):
        paths = photos.demo_photos()
    images = [path.read_bytes() for path in paths]
    with talk.status("exporting the model (the first time only)"):
        manifest = ensure_model(images, options.models / "clip_onnx" / "1" / "model.onnx")
    if not manifest.trained:
        talk.print(UNTRAINED, style="bold yellow")
    with talk.status("starting tritonserver"):
        server = EmbeddedServer(options)
        server.__enter__()
    try:
        if server.remark:
            talk.print(server.remark, highlight=False, soft_wrap=True)
        with EmbeddingClient(options.grpc_url) as client:
            embeddings = client.embed(images)
    finally:
        with talk.status("stopping tritonserver"):
            server.stop()
    names = [path.stem for path in paths]
    width = max(map(len, names))
    data.print("JPEG bytes in, embedding out (512 numbers each; the first five):")
    for name, image, embedding in zip(names, images, embeddings, strict=True):
        numbers = " ".join(f"{value:+.4f}" for value in embedding[:5])
        data.print(f"  {name:<{width}}  {len(image) / 1000:6.0f} KB  {numbers} ...", highlight=False)
    table = similarity_table(names, embeddings)
    Console(width=max(100, (width + 3) * (len(names) + 1))).print(table)
    weights = f"{manifest.model}, {manifest.pretrained if manifest.trained else 'untrained weights'}"
    draw_heat_map(paths, embeddings, picture, subtitle=f"clip_ensemble over gRPC: {weights}")
    shown = picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture
    talk.print(f"the same as a picture: {shown}")
    if not manifest.trained:
        talk.print(UNTRAINED, style="bold yellow")
