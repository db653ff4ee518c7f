"""Groups near-duplicate photographs and chooses which one of each group to keep."""

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
from clip_embed.nearest import DisjointSets, Pairs
from clip_embed.previews import Preview


class Keep(StrEnum):
    """Which photograph of a group is kept. Ties are broken by the next rule, finally by the path."""

    pixels = "pixels"  # most pixels, then the largest file, then the oldest
    size = "size"  # the largest file, then most pixels, then the oldest
    oldest = "oldest"
    newest = "newest"


@dataclass(frozen=True, slots=True)
class ExistingFile:
    """A file that exists, with its current size and time."""

    path: str
    size_bytes: int
    mtime_ns: int


@dataclass
class FileCheck:
    """The existing files by row, and the numbers of other rows."""

    files: dict[int, ExistingFile]
    missing: int = 0
    changed: int = 0
    failed: int = 0
    same_file: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One photograph of a group; `similarity` is its cosine with the one to keep."""

    row: int
    file: ExistingFile
    preview: Preview
    similarity: float


@dataclass(frozen=True, slots=True)
class Group:
    """Two or more connected photographs, the one to keep first, and their pairs as (index, index, cosine)."""

    members: tuple[Member, ...]
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def spare_bytes(self) -> int:
        """The total size of all but the one to keep."""
        return sum(member.file.size_bytes for member in self.members[1:])


def check_files(library: Library) -> FileCheck:
    """The rows of a library that can be duplicates: each existing file once.

    Leaves out files that no longer exist or have changed since they were embedded, and further names of the same file,
    because deleting one of them could delete the only copy.
    """
    checked, seen = FileCheck({}), set()
    for row, image in enumerate(library.images):
        if np.isnan(library.embeddings[row, 0]):
            checked.failed += 1
            continue
        try:
            status = os.stat(image.path)  # noqa: PTH116  Path would normalise the name
        except (OSError, ValueError):
            checked.missing += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            checked.same_file += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        if image.size_bytes is not None and image[1:] != (status.st_size, status.st_mtime_ns):
            checked.changed += 1
            continue
        checked.files[row] = ExistingFile(image.path, status.st_size, status.st_mtime_ns)
    return checked


def connected_rows(pairs: Pairs) -> list[list[int]]:
    """The groups of rows that these pairs connect, in order."""
    sets = DisjointSets()
    edges = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    for first, second in edges:
        sets.join(first, second)
    groups: dict[int, list[int]] = {}
    for row in sorted({row for edge in edges for row in edge}):
        groups.setdefault(sets.find(row), []).append(row)
    return list(groups.values())


def make_groups(
    library: Library, pairs: Pairs, files: dict[int, ExistingFile], previews: dict[int, Preview], keep: Keep
) -> list[Group]:
    """The groups of these pairs, most spare bytes first. `files` and `previews` must have all rows of the pairs."""
    rank = _rank(keep)
    places: dict[int, tuple[int, int]] = {}
    ordered = []
    for number, rows in enumerate(connected_rows(pairs)):
        members = sorted((Member(row, files[row], previews[row], 1.0) for row in rows), key=rank)
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
        pixels, size = -member.preview.width * member.preview.height, -member.file.size_bytes
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
    """Write one JSON object: `about`, and the groups, each with its files (the one to keep first) and pairs."""
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
    """Write a CSV line for each photograph: its group, whether to keep it, and its properties."""
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
        "width": member.preview.width,
        "height": member.preview.height,
        "size_bytes": member.file.size_bytes,
        "mtime": as_date(member.file.mtime_ns),
    }


def as_date(mtime_ns: int) -> str:
    """The time as an ISO date in UTC; empty if it is out of range."""
    try:
        return datetime.fromtimestamp(mtime_ns // 10**9, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return ""
