"""`clip-tools health`: whether a server embeds, for a probe that runs a command."""

import os

from clip_tools.errors import ToolError, missing_extra
from clip_tools.serving.serve import probe_image


def check_health(url: str, timeout_s: float) -> None:
    """Return when the server embedded an image, or had no room for one. Raises ToolError with the reason."""
    try:
        from clip_embed import EmbeddingClient, EmbeddingError, ServerOverloadedError
        from clip_embed.credentials import environment_options
    except ImportError as error:
        raise missing_extra("server", error) from error
    with EmbeddingClient(url, timeout_s=timeout_s, retry=None, **environment_options(os.environ)) as client:
        try:
            client.embed([probe_image()])
        except ServerOverloadedError:
            return  # it has so much to do that it says no to more, which is well
        except EmbeddingError as error:
            raise ToolError(str(error)) from error
