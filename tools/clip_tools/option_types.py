"""Options that commands of several packages share."""

from pathlib import Path
from typing import Annotated

from typer import Option

Port = Annotated[int, Option(min=1, max=65535)]
Models = Annotated[Path, Option(help="The model repository.", envvar="CLIP_MODELS")]
ConfigName = Annotated[
    str | None,
    Option("--model-config-name", help="A named configuration of the deployment, such as cpu-bf16."),
]
