"""`clip-tools health`: whether a server embeds, for a probe that runs a command."""

import os
from functools import partial

from clip_tools.errors import ToolError, missing_extra
from clip_tools.serving.serve import probe_image
from clip_tools.serving.watchdog import ImageProbe


def check_health(url: str, timeout_s: float, metrics_url: str | None = None) -> None:
    """Return when the server embedded an image, had no room for one, or by its metrics embedded others meanwhile.

    Raises ToolError with the reason; with exit code 2 for a URL or certificates that no client can use.
    """
    try:
        from clip_embed import EmbeddingClient, EmbeddingError, ServerOverloadedError
        from clip_embed.credentials import environment_options
    except ImportError as error:
        raise missing_extra("server", error) from error
    new_client = partial(EmbeddingClient, url, timeout_s=timeout_s, retry=None, **environment_options(os.environ))
    try:
        ImageProbe(new_client, probe_image(), metrics_url).ask()
    except ServerOverloadedError:
        return  # it has so much to do that it says no to more, which is well
    except EmbeddingError as error:
        raise ToolError(str(error)) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise ToolError(str(error), exit_code=2) from error
