"""Pages that open from a file: everything is in them, and they fetch nothing."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from clip_embed.duplicates import Group, as_date
from clip_embed.names import printable
from clip_embed.nearest import Joined
from clip_embed.pictures import Picture

# Bytes are what a page of many thumbnails costs: 5,000 groups of three are 40 MB with small ones.
LARGE_PX, SMALL_PX, MOST_LARGE = 256, 128, 1000
_ALL_PAIRS_UP_TO = 12  # photographs in a group; of more, the pairs with the one to keep and those that hold it together


def thumbnail_px(count: int) -> int:
    """How large thumbnails may be on a page of so many."""
    return LARGE_PX if count <= MOST_LARGE else SMALL_PX


def write_gallery(groups: Sequence[Group], file: IO[str], *, threshold: float, about: str) -> None:
    """The groups, to be looked through: a slider over the pairs' cosines, sorted as one likes, by keyboard too."""
    data = {"threshold": threshold, "about": about, "groups": [_group(group) for group in groups]}
    # `<` alone could end the script that it stands in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    head, tail = _template("gallery.html").split("__DATA__")
    file.writelines((head, text, tail))


def write_results(
    results: Sequence[tuple[str, float, Picture]], file: IO[str], *, query: str, shown: Picture | None, about: str
) -> None:
    """What a search found, best first: path, cosine and picture of each; `shown` is the image that was asked with."""
    cards = "\n".join(
        f'<figure><a href="{_url(path)}">{_image(picture)}</a>'
        f"<figcaption><b>{cosine:.4f}</b> {escape(printable(path))}</figcaption></figure>"
        for path, cosine, picture in results
    )
    query_card = _image(shown) if shown else ""
    values = {"__QUERY__": escape(printable(query)), "__SHOWN__": query_card, "__ABOUT__": escape(about)}
    text = _template("results.html")
    for name, value in values.items():
        text = text.replace(name, value)
    file.write(text.replace("__CARDS__", cards))


def _image(picture: Picture) -> str:
    return f'<img alt="" src="{picture.thumbnail}">' if picture.thumbnail else "<i>no picture</i>"


def _group(group: Group) -> dict[str, Any]:
    rows = [
        {
            "p": printable(member.file.path),
            "u": _url(member.file.path),
            "w": member.picture.width,
            "h": member.picture.height,
            "b": member.file.size_bytes,
            "t": as_date(member.file.mtime_ns)[:10],
            "i": member.picture.thumbnail,
        }
        for member in group.members
    ]
    return {"f": rows, "e": [[one, other, round(cosine, 5)] for one, other, cosine in _shown_pairs(group)]}


def _shown_pairs(group: Group) -> Sequence[tuple[int, int, float]]:
    """Enough for the slider: at any threshold they hang the same photographs together as all pairs do."""
    if len(group.members) <= _ALL_PAIRS_UP_TO:
        return group.pairs
    joined = Joined()
    best_first = sorted(group.pairs, key=lambda pair: -pair[2])
    return sorted(pair for pair in best_first if joined.join(pair[0], pair[1]) or pair[0] == 0)


def _url(path: str) -> str:
    """`file:` and the absolute path, with its very bytes."""
    return "file://" + quote(str(Path(path).absolute()).encode(errors="surrogateescape"))


def _template(name: str) -> str:
    return files("clip_embed").joinpath(name).read_text()
