"""What a server reports about its model: the provenance of its vectors, and the file suffixes that it accepts.

`clip-tools` writes it to the parameters of the ensemble's configuration when it starts or swaps a server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from clip_embed.provenance import Provenance

MODEL, CHECKPOINT, PREPROCESS, SUFFIXES = "clip_model", "clip_checkpoint", "clip_preprocess", "clip_suffixes"
"""The names of the parameters."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports. None is for unknown: an earlier version, restricted access, or a model without manifest.

    Args:
        suffixes: of the file formats that it accepts, in lower case, such as `.jpg`.
    """

    provenance: Provenance | None = None
    suffixes: frozenset[str] | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Self:
        """What the parameters of the ensemble's configuration say."""
        provenance = None
        if all(parameters.get(name) for name in (MODEL, CHECKPOINT, PREPROCESS)):
            provenance = Provenance(parameters[MODEL], parameters[CHECKPOINT], parameters[PREPROCESS])
        suffixes = frozenset(parameters.get(SUFFIXES, "").split())
        return cls(provenance, suffixes or None)
