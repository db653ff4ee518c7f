"""Groups of photographs that are nearly the same, and which one of each to keep."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any

import numpy as np

from clip_embed.library import Library
from clip_embed.names import printable
from clip_embed.nearest import Joined, Pairs
from clip_embed.pictures import Picture


class Keep(StrEnum):
    """Which one of a group is kept. What is equal by one rule is decided by the next, at last by the path."""

    pixels = "pixels"  # most pixels, then the largest file, then the oldest
    size = "size"  # the largest file, then most pixels, then the oldest
    oldest = "oldest"
    newest = "newest"


@dataclass(frozen=True, slots=True)
class Present:
    """A file as it is now."""

    path: str
    size_bytes: int
    mtime_ns: int


@dataclass
class Looked:
    """The rows whose files are there, by row, and how many of the others there are."""

    files: dict[int, Present]
    gone: int = 0
    changed: int = 0
    failed: int = 0
    same: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One photograph of a group; `similarity` is its cosine to the one to keep."""

    row: int
    file: Present
    picture: Picture
    similarity: float


@dataclass(frozen=True, slots=True)
class Group:
    """Two photographs or more that hang together, the one to keep first, and the pairs among them by their places."""

    members: tuple[Member, ...]
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def spare_bytes(self) -> int:
        """The size of all but the one to keep."""
        return sum(member.file.size_bytes for member in self.members[1:])


def look_at_files(library: Library) -> Looked:
    """Which rows of a library can be duplicates: each file once, whatever its names, as long as it is there.

    A file that is gone, or has changed since it was embedded, is no copy of another any more; nor is a second name of
    one file, whose removal would end it.
    """
    looked, seen = Looked({}), set()
    for row, image in enumerate(library.images):
        if np.isnan(library.embeddings[row, 0]):
            looked.failed += 1
            continue
        try:
            status = os.stat(image.path)  # noqa: PTH116  Path would normalise the name
        except (OSError, ValueError):
            looked.gone += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            looked.same += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        if image.size_bytes is not None and image[1:] != (status.st_size, status.st_mtime_ns):
            looked.changed += 1
            continue
        looked.files[row] = Present(image.path, status.st_size, status.st_mtime_ns)
    return looked


def rows_of_groups(pairs: Pairs) -> list[list[int]]:
    """The rows that hang together by these pairs, in order."""
    joined = Joined()
    edges = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    for first, second in edges:
        joined.join(first, second)
    groups: dict[int, list[int]] = {}
    for row in sorted({row for edge in edges for row in edge}):
        groups.setdefault(joined.find(row), []).append(row)
    return list(groups.values())


def choose(
    library: Library, pairs: Pairs, files: dict[int, Present], pictures: dict[int, Picture], keep: Keep
) -> list[Group]:
    """The groups of these pairs, whose rows are all in `files` and `pictures`: those with most bytes to spare first."""
    rank = _rank(keep)
    places: dict[int, tuple[int, int]] = {}
    ordered = []
    for number, rows in enumerate(rows_of_groups(pairs)):
        members = sorted((Member(row, files[row], pictures[row], 1.0) for row in rows), key=rank)
        kept = library.embeddings[members[0].row]
        others = [replace(member, similarity=float(library.embeddings[member.row] @ kept)) for member in members[1:]]
        ordered.append((members[0], *others))
        places |= {member.row: (number, place) for place, member in enumerate(ordered[-1])}
    of_group: list[list[tuple[int, int, float]]] = [[] for _ in ordered]
    for first, second, cosine in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.cosines.tolist(), strict=True):
        (number, one), (_, other) = places[first], places[second]
        of_group[number].append((min(one, other), max(one, other), cosine))
    groups = [Group(members, tuple(sorted(some))) for members, some in zip(ordered, of_group, strict=True)]
    return sorted(groups, key=lambda group: (-group.spare_bytes, group.members[0].file.path))


def _rank(keep: Keep) -> Callable[[Member], Any]:
    def rank(member: Member) -> tuple[float | str, ...]:
        pixels, size = -member.picture.width * member.picture.height, -member.file.size_bytes
        age = member.file.mtime_ns
        first: dict[Keep, tuple[float, ...]] = {
            Keep.pixels: (pixels, size, age),
            Keep.size: (size, pixels, age),
            Keep.oldest: (age,),
            Keep.newest: (-age,),
        }
        return (*first[keep], member.file.path)

    return rank


def write_json(groups: Sequence[Group], file: IO[str], **about: object) -> None:
    """One object: what `about` says, and the groups; in each the files, the one to keep first, and their pairs."""
    found = [
        {
            "keep": printable(group.members[0].file.path),
            "files": [_as_row(member, is_kept=place == 0) for place, member in enumerate(group.members)],
            "pairs": [[one, other, round(cosine, 6)] for one, other, cosine in group.pairs],
        }
        for group in groups
    ]
    json.dump({**about, "groups": found}, file, indent=1)
    file.write("\n")


def write_csv(groups: Iterable[Group], file: IO[str]) -> None:
    """A line for each photograph: its group, whether it is the one to keep, and what is known of it."""
    writer: Any = None
    for number, group in enumerate(groups, 1):
        for place, member in enumerate(group.members):
            row = {"group": number, **_as_row(member, is_kept=place == 0)}
            writer = writer or csv.DictWriter(file, row, lineterminator="\n")
            if number == 1 and place == 0:
                writer.writeheader()
            writer.writerow(row)


def _as_row(member: Member, *, is_kept: bool) -> dict[str, object]:
    return {
        "keep": is_kept,
        "path": printable(member.file.path),
        "similarity": round(member.similarity, 6),
        "width": member.picture.width,
        "height": member.picture.height,
        "size_bytes": member.file.size_bytes,
        "mtime": as_date(member.file.mtime_ns),
    }


def as_date(mtime_ns: int) -> str:
    """In UTC; empty for a time that is no year's."""
    try:
        return datetime.fromtimestamp(mtime_ns // 10**9, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return ""
