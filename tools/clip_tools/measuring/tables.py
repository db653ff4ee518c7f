"""Markdown tables, the same for every document that is made of results."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A result's part of the document: its Markdown, and its pictures by file name."""

    text: str
    pictures: dict[str, str] = field(default_factory=dict)


def table(head: str, rows: Iterable[str], *, align: str = "---:") -> str:
    """A table of lines with | between their columns; "" without rows. The first column stands left."""
    lines = [f"| {row} |" for row in rows]
    return "\n".join([f"| {head} |", "|---|" + f"{align}|" * head.count("|"), *lines]) + "\n" if lines else ""
