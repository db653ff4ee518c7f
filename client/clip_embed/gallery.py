"""Writes self-contained HTML pages, which fetch nothing."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from clip_embed.duplicates import Group, as_date
from clip_embed.names import printable
from clip_embed.nearest import DisjointSets
from clip_embed.previews import Preview

# Thumbnails determine a page's size: 5,000 groups of three are 40 MB with small ones.
LARGE_PX, SMALL_PX, MOST_LARGE = 256, 128, 1000
_ALL_PAIRS_UP_TO = 12  # photographs in a group; larger groups show pairs with the one to keep and a spanning tree


def thumbnail_px(count: int) -> int:
    """The size of thumbnails on a page with `count` of them."""
    return LARGE_PX if count <= MOST_LARGE else SMALL_PX


def write_gallery(groups: Sequence[Group], file: IO[str], *, threshold: float, about: str) -> None:
    """Write the page of groups, with a slider for the cosine, sorting, and keyboard shortcuts."""
    data = {"threshold": threshold, "about": about, "groups": [_group(group) for group in groups]}
    # A `<` could end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    head, tail = _template("gallery.html").split("__DATA__")
    file.writelines((head, text, tail))


def write_results(
    results: Sequence[tuple[str, float, Preview]], file: IO[str], *, query: str, shown: Preview | None, about: str
) -> None:
    """Write the page of search results (path, cosine, preview), best first; `shown` is the query's image."""
    cards = "\n".join(
        f'<figure><a href="{_url(path)}">{_image(preview)}</a>'
        f"<figcaption><b>{cosine:.4f}</b> {escape(printable(path))}</figcaption></figure>"
        for path, cosine, preview in results
    )
    query_card = _image(shown) if shown else ""
    values = {"__QUERY__": escape(printable(query)), "__SHOWN__": query_card, "__ABOUT__": escape(about)}
    text = _template("results.html")
    for name, value in values.items():
        text = text.replace(name, value)
    file.write(text.replace("__CARDS__", cards))


def _image(preview: Preview) -> str:
    return f'<img alt="" src="{preview.thumbnail}">' if preview.thumbnail else "<i>no picture</i>"


def _group(group: Group) -> dict[str, Any]:
    rows = [
        {
            "p": printable(member.file.path),
            "u": _url(member.file.path),
            "w": member.preview.width,
            "h": member.preview.height,
            "b": member.file.size_bytes,
            "t": as_date(member.file.mtime_ns)[:10],
            "i": member.preview.thumbnail,
        }
        for member in group.members
    ]
    return {"f": rows, "e": [[one, other, round(cosine, 5)] for one, other, cosine in _shown_pairs(group)]}


def _shown_pairs(group: Group) -> Sequence[tuple[int, int, float]]:
    """Enough pairs for the slider: at any threshold they connect the same photographs as all pairs do."""
    if len(group.members) <= _ALL_PAIRS_UP_TO:
        return group.pairs
    sets = DisjointSets()
    best_first = sorted(group.pairs, key=lambda pair: -pair[2])
    return sorted(pair for pair in best_first if sets.join(pair[0], pair[1]) or pair[0] == 0)


def _url(path: str) -> str:
    """The file: URL of the absolute path, byte for byte."""
    return "file://" + quote(str(Path(path).absolute()).encode(errors="surrogateescape"))


def _template(name: str) -> str:
    return files("clip_embed").joinpath(name).read_text()
