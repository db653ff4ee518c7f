"""What a server says of itself: whose vectors it gives, and which files it takes.

It stands in the parameters of the ensemble's configuration, which `clip-tools` writes as it starts or swaps a server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from clip_embed.provenance import Provenance

MODEL, CHECKPOINT, PREPROCESS, SUFFIXES = "clip_model", "clip_checkpoint", "clip_preprocess", "clip_suffixes"
"""The names of the parameters."""


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
