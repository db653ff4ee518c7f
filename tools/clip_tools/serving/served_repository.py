"""Writes the repository that is served: links to the files of `models/`, and configurations adapted to the machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_tools.repository import read_config, replace_config
from clip_tools.serving.machine import Machine
from clip_tools.serving.towers import Towers


def write_served_repository(models: Path, folder: Path, machine: Machine, towers: Towers | None = None) -> None:
    """Write the repository that is served to `folder`.

    Its files are links into `models`, so models that are exported later are served too. Adapted configurations are
    files.
    """
    for model in (path.parent for path in models.glob("*/config.pbtxt")):
        (folder / model.name / "configs").mkdir(parents=True)
        for path in (*model.iterdir(), *model.glob("configs/*")):
            if path.name != "configs":
                (folder / path.relative_to(models)).symlink_to(path.resolve())
    rewrite_configs(folder, lambda config: adapt_config(config, towers or Towers(), machine))


def adapt_config(config: Any, towers: Towers, machine: Machine, running: Any | None = None) -> bool:
    """Adapt a `ModelConfig` to the towers, then to the machine; whether that changed it."""
    is_resized = towers.apply_to(config)
    return machine.apply_to(config, running) or is_resized


def rewrite_configs(folder: Path, change: Callable[[Any], bool]) -> None:
    """Apply `change` to each configuration of a repository, and write those that it changed."""
    for path in sorted([*folder.glob("*/config.pbtxt"), *folder.glob("*/configs/*.pbtxt")]):
        name = path.stem if path.parent.name == "configs" else None
        config = read_config(folder, path.relative_to(folder).parts[0], name)
        if change(config):
            replace_config(path, config)
