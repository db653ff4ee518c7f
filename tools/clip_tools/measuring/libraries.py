"""`clip-tools libraries`: how fast libraries are searched, and which edits are found at which threshold."""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_tools import photos
from clip_tools.edits import edits
from clip_tools.errors import ToolError, missing_extra
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.measuring.sections import Section, markdown_table
from clip_tools.measuring.services import free_ports
from clip_tools.paths import MODELS
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clip_embed import EmbeddingClient

SIZE = 512
THRESHOLDS = (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
SPEED_THRESHOLD = 0.96
_QUERIES = 50
_COUNT = 10


def synthetic(rows: int, *, seed: int = 0) -> "npt.NDArray[np.float32]":
    """(rows, 512) unit vectors as CLIP's are: a common direction, fewer and fewer of the others, and every twentieth is
    near the one before it (cosine 0.97 to 0.99).
    """
    import numpy as np

    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, SIZE), dtype=np.float32)
    vectors *= (np.arange(1, SIZE + 1) ** -0.5).astype(np.float32)
    vectors[:, 0] += 2
    near = vectors[1::20]
    near[:] = vectors[0::20][: len(near)] + 0.02 * random.standard_normal(near.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def measure_speed(rows: int) -> dict[str, Any]:
    """Of a Parquet of so many synthetic vectors: seconds to read it, to find its pairs; milliseconds a query."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        path = Path(folder) / "library.parquet"
        process.submit(_write_synthetic, path, rows).result()
        measured: dict[str, Any] = {}
        for measure in (_search, _duplicates, _by_index):  # each in a process of its own, for its memory
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                measured |= alone.submit(measure, path).result()
    return {"rows": rows, **measured}


def _write_synthetic(path: Path, rows: int) -> None:
    from clip_embed.output import Format, open_output
    from clip_embed.table import ImageFile

    with open_output(path, Format.parquet) as output:
        for number, vector in enumerate(synthetic(rows)):
            output.add(ImageFile(f"{number:08d}.jpg", 1, 1), vector)


def _search(path: Path) -> dict[str, Any]:
    from clip_embed.library import read_library
    from clip_embed.nearest import nearest

    began_s = time.perf_counter()
    library = read_library(path)
    read_s = time.perf_counter() - began_s
    times_s = _query_times_s(library.embeddings, lambda query: nearest(library.embeddings, query, _COUNT))
    return {
        "read_s": read_s,
        "search_ms": 1000 * statistics.median(times_s),
        "search_worst_ms": 1000 * max(times_s),
        "search_memory_mib": _memory_mib(),
    }


def _duplicates(path: Path) -> dict[str, Any]:
    from clip_embed.library import read_library
    from clip_embed.nearest import pairs_above

    library = read_library(path)
    began_s = time.perf_counter()
    pairs = pairs_above(library.embeddings, SPEED_THRESHOLD)
    return {
        "duplicates_s": time.perf_counter() - began_s,
        "pairs": pairs.total,
        "duplicates_memory_mib": _memory_mib(),
    }


def _by_index(path: Path) -> dict[str, Any]:
    from clip_embed.index import index_of, nearest_by_index, recall, require_usearch
    from clip_embed.library import read_library

    try:
        require_usearch()
    except ModuleNotFoundError:
        return {}
    library = read_library(path)
    began_s = time.perf_counter()
    index = index_of(library, lambda _: None)
    made_s = time.perf_counter() - began_s
    times_s = _query_times_s(
        library.embeddings, lambda query: nearest_by_index(index, library.embeddings, query, _COUNT)
    )
    return {
        "index_made_s": made_s,
        "index_search_ms": 1000 * statistics.median(times_s),
        "index_recall": recall(index, library.embeddings),
    }


def _query_times_s(
    embeddings: "npt.NDArray[np.float32]", search: "Callable[[npt.NDArray[np.float32]], object]"
) -> list[float]:
    times_s = []
    for query in embeddings[:: max(1, len(embeddings) // _QUERIES)]:
        began_s = time.perf_counter()
        search(query)
        times_s.append(time.perf_counter() - began_s)
    return times_s


def _memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_edits(paths: Sequence[Path], models: Path, tell: Callable[[str, int, int], object]) -> dict[str, Any]:
    """Of photographs and their edits, embedded by a server: at each threshold the share of edits that are a pair with
    their photograph, and what is a pair or a group by mistake.
    """
    try:
        import numpy as np
        from PIL import Image

        from clip_embed import EmbeddingClient
    except ImportError as error:
        raise missing_extra("server", error) from error
    from clip_tools.export.manifest import Manifest

    manifest = Manifest.read(models / "clip_onnx" / "1" / "model.onnx")
    if manifest is None:
        raise ToolError(f"{models}: expected an exported model with its manifest, found none: clip-tools export-onnx")
    made = edits()
    http, grpc, metrics = free_ports(3)
    with tempfile.TemporaryDirectory() as folder:
        options = ServeOptions(
            models=models, http_port=http, grpc_port=grpc, metrics_port=metrics, log=Path(folder) / "log"
        )
        with EmbeddedServer(options), EmbeddingClient(options.grpc_url, timeout_s=600) as client:
            vectors = []  # of each photograph, then of its edits
            for number, path in enumerate(paths, 1):
                tell("photographs and their edits", number, len(paths))
                with Image.open(path) as image:
                    image.draft("RGB", (1600, 1600))
                    rgb = image.convert("RGB")
                vectors.append(client.embed([path, *(edit(rgb) for edit in made.values())]))
            duplicates = measure_duplicates(client)
    found = np.stack(vectors)  # (photographs, 1 + edits, D)
    return {
        "model": manifest.model,
        "weights": manifest.pretrained if manifest.trained else "untrained",
        "trained": manifest.trained,
        "photographs": len(paths),
        "edits": list(made),
        "thresholds": [_at(found, threshold) for threshold in THRESHOLDS],
        "imagededup": duplicates,
    }


def measure_duplicates(client: "EmbeddingClient") -> dict[str, Any]:
    """For imagededup's near-duplicates: how many pairs are found at each threshold, and how many by mistake."""
    import numpy as np

    files = photos.duplicate_photos()
    photograph = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    vectors = client.embed([path for paths in files.values() for path in paths])
    first, second = np.triu_indices(len(vectors), 1)
    is_pair = photograph[first] == photograph[second]
    cosines = (vectors[first] * vectors[second]).sum(axis=1)
    return {
        "photographs": len(files),
        "files": len(vectors),
        "pairs": int(is_pair.sum()),
        "found": [int((is_pair & (cosines >= threshold)).sum()) for threshold in THRESHOLDS],
        "false": [int((~is_pair & (cosines >= threshold)).sum()) for threshold in THRESHOLDS],
    }


def _at(found: "npt.NDArray[np.float32]", threshold: float) -> dict[str, Any]:
    import numpy as np

    from clip_embed.duplicates import rows_of_groups
    from clip_embed.nearest import pairs_above

    _, each, size = found.shape
    with_original = np.einsum("ned,nd->ne", found[:, 1:], found[:, 0])
    pairs = pairs_above(found.reshape(-1, size), threshold)
    is_false = pairs.first // each != pairs.second // each
    of_originals = (pairs.first % each == 0) & (pairs.second % each == 0)
    groups = [{row // each for row in rows} for rows in rows_of_groups(pairs)]
    return {
        "threshold": threshold,
        "recall": [round(float(share), 4) for share in (with_original >= threshold).mean(axis=0)],
        "pairs": pairs.total,
        "false_pairs": int(is_false.sum()),
        "false_pairs_of_photographs": int((is_false & of_originals).sum()),
        "groups": len(groups),
        "false_groups": sum(len(sources) > 1 for sources in groups),
        "photographs_in_false_groups": sum(len(sources) for sources in groups if len(sources) > 1),
    }


def libraries(*, rows: int, models: Path = MODELS, tell: Callable[[str, int, int], object]) -> dict[str, Any]:
    """Both measurements."""
    environment = asdict(fingerprint())
    tell(f"{rows:,} synthetic vectors", 0, 1)
    speed = measure_speed(rows)
    paths = photos.gate_photos()
    return {
        "kind": "libraries",
        "environment": environment,
        "speed": speed,
        "edits": measure_edits(paths, models, tell),
    }


def libraries_section(_: str, result: dict[str, Any]) -> Section:
    """How fast, and what is found at each threshold."""
    return Section(f"{speed_text(result['speed'])}\n{edits_text(result['edits'])}")


def measured_text(result: dict[str, Any]) -> str:
    """The same with the machine and its load, for docs/search.md."""
    machine = result["environment"]
    return (
        f"{edits_text(result['edits'])}\n{speed_text(result['speed'])}\n"
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']:.1f} as it began, "
        f"{machine['date'][:10]}: `{machine['command']}`.\n"
    )


def speed_text(speed: dict[str, Any]) -> str:
    """The search and the comparison of all pairs, and the index."""
    rows = [
        ("read from Parquet", f"{speed['read_s']:.2f} s", ""),
        ("search, exact", f"{speed['search_ms']:.1f} ms a query", f"{speed['search_memory_mib']:.0f} MiB"),
        (
            f"all pairs of {SPEED_THRESHOLD} or more, exact ({speed['pairs']:,})",
            f"{speed['duplicates_s']:.1f} s",
            f"{speed['duplicates_memory_mib']:.0f} MiB",
        ),
    ]
    if "index_recall" in speed:
        rows.append(("index made", f"{speed['index_made_s']:.1f} s", ""))
        found = f"search by index, recall {speed['index_recall']:.3f}"
        rows.append((found, f"{speed['index_search_ms']:.1f} ms a query", ""))
    head = (f"{speed['rows']:,} synthetic vectors", "time", "peak memory of the process")
    return markdown_table(head, rows)


def edits_text(edited: dict[str, Any]) -> str:
    """What share of each edit is found at each threshold, and what is found by mistake."""
    levels = edited["thresholds"]
    head = ("edit", *(f"{level['threshold']:.2f}" for level in levels))
    rows = [
        (edit, *(f"{level['recall'][place]:.0%}" for level in levels)) for place, edit in enumerate(edited["edits"])
    ]
    for title, key in {
        "groups of more than one photograph": "false_groups",
        "photographs in these": "photographs_in_false_groups",
        "pairs of different photographs as they are": "false_pairs_of_photographs",
    }.items():
        rows.append((title, *(str(level[key]) for level in levels)))
    also = ""
    if duplicates := edited.get("imagededup"):
        rows.append((f"imagededup: pairs found, of {duplicates['pairs']}", *map(str, duplicates["found"])))
        rows.append(("imagededup: pairs of different photographs", *map(str, duplicates["false"])))
        also = (
            f" The last two lines are imagededup's {duplicates['files']} test images, {duplicates['photographs']} "
            "photographs and edits of one of them: mirrored, made square, turned by 30 degrees, gray. Each two "
            "of that one are a pair."
        )
    untrained = "" if edited["trained"] else " **Untrained weights: this counts for nothing.**"
    return (
        f"{edited['photographs']} photographs and {len(edited['edits'])} edits of each, by {edited['model']} "
        f"({edited['weights']}): the share of edits that are a pair with their photograph at each threshold, and the "
        f"groups that join different photographs.{also}{untrained}\n\n{markdown_table(head, rows)}"
    )
