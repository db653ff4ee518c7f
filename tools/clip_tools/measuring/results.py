"""Result files: what every measuring verb writes and `report` and `compare` read."""

import json
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError


def write(result: dict[str, Any], output: Path) -> None:
    """The result as a JSON file, a row a line, so that two of them can be compared by eye."""
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n  {rows}\n ]" if value else f" {json.dumps(key)}: []")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    output.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def keep_earlier(output: Path) -> Path | None:
    """Move the result that is at `output` to a name with its time, as in bench-20261129T120408.json; where it is now.

    None where there was none. Raises ToolError for a file that is no result, which stays.
    """
    if not output.exists():
        return None
    time = read(output)["environment"]["date"][:19].replace("-", "").replace(":", "")
    names = (f"{output.stem}-{time}{tail}{output.suffix}" for tail in ("", *(f"-{n}" for n in range(2, 1000))))
    kept = next(path for path in map(output.with_name, names) if not path.exists())
    return output.rename(kept)


def read(path: Path) -> dict[str, Any]:
    """A result that some verb wrote. Raises ToolError when the file is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if "kind" not in result or "environment" not in result:
            raise ValueError("it has no kind and environment")
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(f"{path}: expected a result of clip-tools: {error}", exit_code=2) from error
    return result
