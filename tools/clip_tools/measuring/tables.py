"""Markdown tables, the same for every document that is made of results."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Section:
    """A result's part of the document: its Markdown, and its pictures by file name."""

    text: str
    pictures: dict[str, str] = field(default_factory=dict)


def table(head: str, row: str, rows: Iterable[Mapping[str, Any]], *, align: str = "---:") -> str:
    """`head`, then `row` formatted with each of `rows`; both have | between columns. The first column stands left."""
    lines = [f"| {head} |", "|---|" + f"{align}|" * head.count("|"), *(f"| {row.format(**one)} |" for one in rows)]
    return "\n".join(lines) + "\n"
