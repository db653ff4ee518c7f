"""How long work reports its progress."""

from collections.abc import Callable

Advance = Callable[[str, int, int], None]
"""Gets what is being done, how many of it are done, and how many there are."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
