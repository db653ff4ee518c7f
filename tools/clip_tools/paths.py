"""The folders of a checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
BACKENDS = ROOT / "backends"
CACHE = ROOT / ".cache"
RESULTS = ROOT / "results"
