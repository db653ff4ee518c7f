"""What a server says of itself: whose vectors it gives, and which files it takes.

It stands in the parameters of the ensemble's configuration, which `clip-tools` writes as it starts or swaps a server.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

MODEL, CHECKPOINT, PREPROCESS, SUFFIXES = "clip_model", "clip_checkpoint", "clip_preprocess", "clip_suffixes"
"""The names of the parameters."""


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


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says. Each is None where it does not: an earlier version, a closed one, a model without manifest.

    Args:
        suffixes: of the files whose formats it takes, in lower case, such as `.jpg`.
    """

    provenance: Provenance | None = None
    suffixes: frozenset[str] | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Self:
        """By the parameters of the ensemble's configuration."""
        provenance = None
        if all(parameters.get(name) for name in (MODEL, CHECKPOINT, PREPROCESS)):
            provenance = Provenance(parameters[MODEL], parameters[CHECKPOINT], parameters[PREPROCESS])
        suffixes = frozenset(parameters.get(SUFFIXES, "").split())
        return cls(provenance, suffixes or None)
