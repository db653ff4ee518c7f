"""Of which weights vectors are, kept with them: in Parquet's metadata, beside other files as NAME.provenance.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Provenance:
    """Whose vectors they are: those of one provenance belong in one index.

    Args:
        model: open_clip's name of the architecture.
        checkpoint: the sha256 of the weights' file, or the tag by which open_clip found them.
        preprocess: how pixels are made, such as `exact` (open_clip's own) or `fast`.
    """

    model: str
    checkpoint: str
    preprocess: str

    def __str__(self) -> str:
        is_digest = len(self.checkpoint) == 64
        checkpoint = f"checkpoint {self.checkpoint[:12]}..." if is_digest else self.checkpoint
        return f"{self.model}, {checkpoint}, preprocess {self.preprocess}"

    def has_weights_of(self, other: "Provenance") -> bool:
        """Whether the vectors can be compared: the pixels may be made another way, which moves them a little."""
        return (self.model, self.checkpoint) == (other.model, other.checkpoint)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self | None:
        """None for what is no provenance."""
        try:
            found = json.loads(text)
            return cls(*("" + found[name] for name in cls.__slots__))
        except (ValueError, KeyError, TypeError):
            return None


def beside(path: Path) -> Path:
    """Where it is kept for a file of a format that has no place for it."""
    return path.with_name(f"{path.name}.provenance.json")


def read_beside(path: Path) -> Provenance | None:
    """None where it is not known: an earlier version wrote the file, or the server did not say."""
    try:
        return Provenance.from_json(beside(path).read_bytes())
    except OSError:
        return None


def write_beside(path: Path, provenance: Provenance | None) -> None:
    """After the file itself, and `beside(path)` is removed before it: in between it is not known, and never wrong."""
    if provenance:
        beside(path).write_text(f"{provenance.to_json()}\n")
