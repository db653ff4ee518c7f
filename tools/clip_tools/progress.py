"""How long work reports its progress."""

from typing import Protocol


class Tell(Protocol):
    """Is told the current step, how many parts of the work are done, and how many there are (None: not known)."""

    def __call__(self, what: str, done: int = 0, total: int | None = None, /) -> None: ...


def silent(what: str, done: int = 0, total: int | None = None, /) -> None:
    """Report nothing."""
