"""`clip-tools serve`: runs the embedded server in the foreground."""

import sys

from clip_tools import c_libraries
from clip_tools.export.manifest import Manifest
from clip_tools.repository import ENSEMBLE, deployment, engine_of
from clip_tools.serving.access import exposure_warning
from clip_tools.serving.machine import Machine
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer
from clip_tools.serving.supervisor import Supervisor


def serve(options: ServeOptions) -> None:
    """Serve until a signal comes. Raises ToolError if the first server cannot start."""
    processes = Machine.here(options.preprocess_instances).describe_preprocess(options.models, options.config_name)
    ready_line = (
        f"{ENSEMBLE} embeds at {options.grpc_url} and {options.http_url} (metrics on port {options.metrics_port}), "
        f"{processes}; Ctrl-C stops it\n{warning_if_untrained(options)}"
    ).strip()
    if warning := exposure_warning(options.host, options.access):
        _say(warning)
    if not c_libraries.library_path(source := c_libraries.IGNORE_CANCELLATION).is_file():
        _say(f"{c_libraries.WITHOUT[source]}: {source.name} is not built; run `make setup`")
    supervisor = Supervisor(lambda: EmbeddedServer(options), _say, ready_line)
    with supervisor.stopping_on_signals():
        supervisor.run()


def warning_if_untrained(options: ServeOptions) -> str:
    """A line that says that the weights are untrained; empty for trained weights."""
    file = engine_of(deployment(options.models, options.config_name)).file
    manifest = Manifest.read(file) if file else None
    if manifest is None or manifest.trained:
        return ""
    return f"UNTRAINED WEIGHTS ({manifest.pretrained}): the vectors mean nothing; export trained weights\n"


def _say(line: str) -> None:
    sys.stderr.write(f"clip-tools: {line}\n")
