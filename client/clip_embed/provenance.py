"""The weights that vectors come from; stored in Parquet's metadata, for other formats in NAME.provenance.json."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where vectors come from. All vectors of a file have the same provenance.

    Args:
        model: open_clip's name of the architecture.
        checkpoint: the sha256 of the weights' file, or open_clip's tag for them.
        preprocess: the mode that makes the pixels, such as `exact` (open_clip's own) or `fast`; "" for texts.
    """

    model: str
    checkpoint: str
    preprocess: str

    def __str__(self) -> str:
        is_digest = len(self.checkpoint) == 64
        checkpoint = f"checkpoint {self.checkpoint[:12]}..." if is_digest else self.checkpoint
        return f"{self.model}, {checkpoint}, {f'preprocess {self.preprocess}' if self.preprocess else 'texts'}"

    def of_texts(self) -> "Provenance":
        """The provenance of texts that the same server embeds."""
        return replace(self, preprocess="")

    def has_weights_of(self, other: "Provenance") -> bool:
        """Whether the vectors can be compared. A different `preprocess` changes them only a little."""
        return (self.model, self.checkpoint) == (other.model, other.checkpoint)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self | None:
        """The provenance in a JSON text; None if the text is something else."""
        try:
            found = json.loads(text)
            return cls(*("" + found[name] for name in cls.__slots__))
        except (ValueError, KeyError, TypeError):
            return None


def sidecar_path(path: Path) -> Path:
    """The path of the file that keeps the provenance of a .jsonl or .npy file."""
    return path.with_name(f"{path.name}.provenance.json")


def read_sidecar(path: Path) -> Provenance | None:
    """The provenance of a file; None if an earlier version wrote it or the server did not report its weights."""
    try:
        return Provenance.from_json(sidecar_path(path).read_bytes())
    except OSError:
        return None


def write_sidecar(path: Path, provenance: Provenance | None) -> None:
    """Write the provenance beside a file.

    Remove `sidecar_path(path)` before the file is replaced and call this afterwards, so that it is never wrong.
    """
    if provenance:
        sidecar_path(path).write_text(f"{provenance.to_json()}\n")
