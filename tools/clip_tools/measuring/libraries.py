"""`clip-tools libraries`: how fast libraries are searched, and which edits are found at which threshold."""

import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_embed import EmbeddingClient
from clip_embed.duplicates import connected_rows
from clip_embed.library import Library, read_library
from clip_embed.nearest import nearest, pairs_above
from clip_embed.output import Format, open_output
from clip_embed.table import ImageFile
from clip_tools import photos
from clip_tools.edits import edits
from clip_tools.errors import ToolError, needs_extra
from clip_tools.measuring.options import LibrariesOptions
from clip_tools.measuring.results import begin
from clip_tools.measuring.services import triton_service
from clip_tools.measuring.tables import Section, table
from clip_tools.measuring.timing import alone, timed, times_of
from clip_tools.measuring.variants import Variant
from clip_tools.progress import Tell, silent

SIZE = 512
THRESHOLDS = (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
SPEED_THRESHOLD = 0.96
_QUERIES = 50
_COUNT = 10


def synthetic(rows: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """(rows, 512) unit vectors as CLIP's are: a common direction, fewer and fewer of the others.

    Every twentieth is near the one before it (cosine 0.97 to 0.99).
    """
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, SIZE), dtype=np.float32)
    vectors *= (np.arange(1, SIZE + 1) ** -0.5).astype(np.float32)
    vectors[:, 0] += 2
    near = vectors[1::20]
    near[:] = vectors[0::20][: len(near)] + 0.02 * random.standard_normal(near.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _measure_speed(rows: int) -> dict[str, Any]:
    """For a Parquet file of synthetic vectors: seconds to read it and to find its pairs, milliseconds for a query."""
    speed: dict[str, Any] = {"rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.parquet"
        alone(_write_synthetic, path, rows)
        for measure in (_search, _duplicates, _by_index):
            speed |= alone(measure, path)  # in another process, for its peak of memory
    return speed


def _write_synthetic(path: Path, rows: int) -> None:
    with open_output(path, Format.parquet) as output:
        for number, vector in enumerate(synthetic(rows)):
            output.add(ImageFile(f"{number:08d}.jpg", 1, 1), vector)


def _search(path: Path) -> dict[str, Any]:
    library, read_s = timed(read_library, path)
    times_ms = _query_times_ms(library, lambda query: nearest(library.embeddings, query, _COUNT))
    speed = {"read_s": read_s, "search_ms": statistics.median(times_ms), "search_worst_ms": max(times_ms)}
    return speed | {"search_memory_mib": _memory_mib()}


def _duplicates(path: Path) -> dict[str, Any]:
    pairs, took_s = timed(pairs_above, read_library(path).embeddings, SPEED_THRESHOLD)
    return {"duplicates_s": took_s, "pairs": pairs.total, "duplicates_memory_mib": _memory_mib()}


def _by_index(path: Path) -> dict[str, Any]:
    from clip_embed.index import nearest_by_index, open_index, recall, require_usearch

    try:
        require_usearch()
    except ModuleNotFoundError:
        return {}
    library = read_library(path)
    index, made_s = timed(open_index, library, lambda _: None)
    times_ms = _query_times_ms(library, lambda query: nearest_by_index(index, library.embeddings, query, _COUNT))
    found = recall(index, library.embeddings)
    return {"index_made_s": made_s, "index_search_ms": statistics.median(times_ms), "index_recall": found}


def _query_times_ms(library: Library, search: Callable[[Any], object]) -> list[float]:
    queries = library.embeddings[:: max(1, len(library.embeddings) // _QUERIES)]
    return [1000 * time_s for time_s in times_of(search, list(queries), 0)]


def _memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure_edits(paths: Sequence[Path], models: Path, tell: Tell) -> dict[str, Any]:
    """Which edits are found as a pair with their photograph at each threshold, and which pairs are wrong.

    The same for imagededup's test images: ten photographs, and four edits of one of them.
    """
    with needs_extra("server"):
        from PIL import Image

    from clip_tools.export.manifest import Manifest

    manifest = Manifest.read(models / "clip_onnx" / "1" / "model.onnx")
    if manifest is None:
        raise ToolError(f"{models}: expected an exported model with its manifest, found none: clip-tools export-onnx")
    made, vectors, files = edits(), [], photos.duplicate_photos()
    with triton_service(Variant(), models) as server, EmbeddingClient(server.url, timeout_s=600) as client:
        for number, path in enumerate(paths, 1):
            tell("photographs and their edits", number, len(paths))
            with Image.open(path) as image:
                image.draft("RGB", (1600, 1600))
                rgb = image.convert("RGB")
            vectors.append(client.embed([path, *(edit(rgb) for edit in made.values())]))
        of_imagededup = client.embed([path for of_one in files.values() for path in of_one])
    return {
        "model": manifest.model,
        "weights": manifest.pretrained if manifest.trained else "untrained",
        "trained": manifest.trained,
        "photographs": len(paths),
        "edits": list(made),
        "thresholds": [_at(np.stack(vectors), threshold) for threshold in THRESHOLDS],
        "imagededup": {"photographs": len(files), **_pairs_found(of_imagededup, list(map(len, files.values())))},
    }


def _pairs_found(vectors: npt.NDArray[np.float32], sizes: Sequence[int]) -> dict[str, Any]:
    """How many pairs of files each threshold finds, and how many by mistake; each photograph has `sizes` files."""
    photograph = np.repeat(np.arange(len(sizes)), sizes)
    found = [pairs_above(vectors, threshold) for threshold in THRESHOLDS]
    right = [int((photograph[pairs.first] == photograph[pairs.second]).sum()) for pairs in found]
    return {
        "files": len(vectors),
        "pairs": sum(size * (size - 1) // 2 for size in sizes),
        "found": right,
        "false": [pairs.total - count for pairs, count in zip(found, right, strict=True)],
    }


def _at(vectors: npt.NDArray[np.float32], threshold: float) -> dict[str, Any]:
    """What one threshold finds among (photographs, 1 + edits, D), each photograph before its edits."""
    _, each, size = vectors.shape
    with_original = np.einsum("ned,nd->ne", vectors[:, 1:], vectors[:, 0])
    pairs = pairs_above(vectors.reshape(-1, size), threshold)
    is_false = pairs.first // each != pairs.second // each
    of_originals = (pairs.first % each == 0) & (pairs.second % each == 0)
    groups = [{row // each for row in rows} for rows in connected_rows(pairs)]
    false_groups = [sources for sources in groups if len(sources) > 1]
    return {
        "threshold": threshold,
        "recall": [round(float(share), 4) for share in (with_original >= threshold).mean(axis=0)],
        "pairs": pairs.total,
        "false_pairs": int(is_false.sum()),
        "false_pairs_of_photographs": int((is_false & of_originals).sum()),
        "groups": len(groups),
        "false_groups": len(false_groups),
        "photographs_in_false_groups": sum(map(len, false_groups)),
    }


def libraries(options: LibrariesOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """Both measurements."""
    result = begin("libraries")
    tell(f"{options.rows:,} synthetic vectors")
    result["speed"] = _measure_speed(options.rows)
    return result | {"edits": _measure_edits(photos.gate_photos(), options.models, tell)}


def libraries_section(_: str, result: dict[str, Any]) -> Section:
    """How fast, and what is found at each threshold."""
    return Section(f"{_speed_text(result['speed'])}\n{_edits_text(result['edits'])}")


def measured_text(result: dict[str, Any]) -> str:
    """The same with the machine and its load, for docs/search.md."""
    machine = result["environment"]
    return (
        f"{_edits_text(result['edits'])}\n{_speed_text(result['speed'])}\n"
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']:.1f} as it began, "
        f"{machine['date'][:10]}: `{machine['command']}`.\n"
    )


def _speed_text(speed: dict[str, Any]) -> str:
    """The search and the comparison of all pairs, and the index."""
    lines = [
        "read from Parquet | {read_s:.2f} s | ",
        "search, exact | {search_ms:.1f} ms a query | {search_memory_mib:.0f} MiB",
        f"all pairs of {SPEED_THRESHOLD} or more, exact ({{pairs:,}}) | {{duplicates_s:.1f}} s | "
        "{duplicates_memory_mib:.0f} MiB",
    ]
    if "index_recall" in speed:
        lines.append("index made | {index_made_s:.1f} s | ")
        lines.append("search by index, recall {index_recall:.3f} | {index_search_ms:.1f} ms a query | ")
    head = f"{speed['rows']:,} synthetic vectors | time | peak memory of the process"
    return table(head, (line.format(**speed) for line in lines))


def _edits_text(edited: dict[str, Any]) -> str:
    """What share of each edit is found at each threshold, and what is found by mistake."""
    levels = edited["thresholds"]
    shares = {edit: [f"{one['recall'][place]:.0%}" for one in levels] for place, edit in enumerate(edited["edits"])}
    for title, key in {
        "groups of more than one photograph": "false_groups",
        "photographs in these": "photographs_in_false_groups",
        "pairs of different photographs as they are": "false_pairs_of_photographs",
    }.items():
        shares[title] = [str(one[key]) for one in levels]
    also = ""
    if duplicates := edited.get("imagededup"):
        shares[f"imagededup: pairs found, of {duplicates['pairs']}"] = list(map(str, duplicates["found"]))
        shares["imagededup: pairs of different photographs"] = list(map(str, duplicates["false"]))
        also = (
            f" The last two lines are imagededup's {duplicates['files']} test images, {duplicates['photographs']} "
            "photographs and edits of one of them: mirrored, made square, turned by 30 degrees, gray. Every two "
            "files of that photograph are a pair."
        )
    untrained = "" if edited["trained"] else " **Untrained weights: this counts for nothing.**"
    head = " | ".join(["edit", *(f"{one['threshold']:.2f}" for one in levels)])
    rows = (" | ".join([title, *texts]) for title, texts in shares.items())
    return (
        f"{edited['photographs']} photographs and {len(edited['edits'])} edits of each, by {edited['model']} "
        f"({edited['weights']}): the share of edits that are a pair with their photograph at each threshold, and the "
        f"groups that join different photographs.{also}{untrained}\n\n{table(head, rows)}"
    )
