"""The folders of a checkout."""

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
BACKENDS = ROOT / "backends"
CACHE = ROOT / ".cache"
RESULTS = ROOT / "results"


def import_from(folder: Path, name: str) -> Any:
    """A module that is in no package, such as those of models and backends."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)
