"""`clip-tools health`: checks that a server embeds, for probes that run a command."""

import os
from functools import partial

from clip_tools.errors import ToolError, needs_extra
from clip_tools.serving.probe import ImageProbe, probe_image


def check_health(url: str, timeout_s: float, metrics_url: str | None = None) -> None:
    """Return if the server embeds an image, is too busy for one, or embeds for others according to its metrics.

    Raises ToolError with the reason. Exit code 2: the URL or the certificates are invalid.
    """
    with needs_extra("server"):
        from clip_embed import EmbeddingClient, EmbeddingError, ServerOverloadedError
        from clip_embed.credentials import environment_options
    new_client = partial(EmbeddingClient, url, timeout_s=timeout_s, retry=None, **environment_options(os.environ))
    try:
        ImageProbe(new_client, probe_image(), metrics_url).ask()
    except ServerOverloadedError:
        return  # a full queue is healthy
    except EmbeddingError as error:
        raise ToolError(str(error)) from error
    except (ValueError, ModuleNotFoundError) as error:
        raise ToolError(str(error), exit_code=2) from error
