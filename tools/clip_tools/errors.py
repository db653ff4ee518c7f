"""The error of the tools that a user can fix."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ToolError(Exception):
    """What was expected, what it got and what to do, in one line. The command prints it and exits with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def exits_with_reason(program: str) -> Iterator[None]:
    """Ends the process with its exit code on a ToolError, and the reason as one line on stderr."""
    try:
        yield
    except ToolError as error:
        sys.stderr.write(f"{program}: {error}\n")
        sys.exit(error.exit_code)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raises ToolError for an import in it that fails: which extra to install."""
    try:
        yield
    except ImportError as error:
        raise ToolError(f"{error.name} is not installed: pip install 'clip-embed[{extra}]'", exit_code=2) from error
