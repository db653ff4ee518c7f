"""The error of the tools that a user can fix."""


class ToolError(Exception):
    """What was expected, what it got and what to do, in one line. The command prints it and exits with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def missing_extra(extra: str, error: ImportError) -> ToolError:
    """The error for a command whose extra is not installed."""
    return ToolError(f"{error.name} is not installed: pip install 'clip-embed[{extra}]'", exit_code=2)
