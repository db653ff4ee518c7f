"""Result files: what every measuring verb writes and `report` and `compare` read."""

import itertools
import json
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring.fingerprint import fingerprint


def begin(kind: str) -> dict[str, Any]:
    """The first fields of every result: its kind and the environment. Call it before measuring."""
    return {"kind": kind, "environment": fingerprint()}


def write(result: dict[str, Any], output: Path) -> None:
    """Write the result as JSON, one row a line, so that two results can be compared by eye."""
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if value and isinstance(value, list | tuple):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    output.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def keep_earlier(output: Path) -> Path | None:
    """Rename an earlier result at `output` to a name with its time, such as bench-20261129T120408.json; the new path.

    None without one. Raises ToolError for a file that is no result, and keeps it.
    """
    if not output.exists():
        return None
    time = read(output)["environment"]["date"][:19].replace("-", "").replace(":", "")
    tails = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (output.with_name(f"{output.stem}-{time}{tail}{output.suffix}") for tail in tails)
    return output.rename(next(path for path in paths if not path.exists()))


def read(path: Path) -> dict[str, Any]:
    """A result that a verb wrote. Raises ToolError for any other file."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if "kind" not in result or "environment" not in result:
            raise ValueError("it has no kind and environment")
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(f"{path}: expected a result of clip-tools: {error}", exit_code=2) from error
    return result
