"""Result files: what every measuring verb writes and `report` and `compare` read."""

import itertools
import json
from pathlib import Path
from typing import Any, Protocol

from clip_tools.errors import ToolError
from clip_tools.measuring.fingerprint import fingerprint


class Tell(Protocol):
    """Told what goes on, how many measurements are done, and how many there are (None: not known)."""

    def __call__(self, what: str, done: int = 0, total: int | None = None, /) -> None: ...


def silent(what: str, done: int = 0, total: int | None = None, /) -> None:
    """Shows nothing."""


def begin(kind: str) -> dict[str, Any]:
    """A result as every verb begins it, before it measures: its kind, and where it runs."""
    return {"kind": kind, "environment": fingerprint()}


def write(result: dict[str, Any], output: Path) -> None:
    """The result as a JSON file, a row a line, so that two of them can be compared by eye."""
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if value and isinstance(value, list | tuple):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    output.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def keep_earlier(output: Path) -> Path | None:
    """Move the result that is at `output` to a name with its time, as in bench-20261129T120408.json; where it is now.

    None where there was none. Raises ToolError for a file that is no result, which stays.
    """
    if not output.exists():
        return None
    time = read(output)["environment"]["date"][:19].replace("-", "").replace(":", "")
    tails = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (output.with_name(f"{output.stem}-{time}{tail}{output.suffix}") for tail in tails)
    return output.rename(next(path for path in paths if not path.exists()))


def read(path: Path) -> dict[str, Any]:
    """A result that some verb wrote. Raises ToolError when the file is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if "kind" not in result or "environment" not in result:
            raise ValueError("it has no kind and environment")
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(f"{path}: expected a result of clip-tools: {error}", exit_code=2) from error
    return result
