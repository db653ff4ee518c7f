"""The command `clip-tools`. `clip_tools.cli.NAME` has the options of `clip-tools NAME`, and imports what it runs."""

import sys

from clip_tools import proxy
from clip_tools.errors import exits_with_reason

try:
    import typer
except ImportError:
    sys.exit("clip-tools: typer is not installed: pip install 'clip-embed[cli]'")

from clip_tools.cli import (
    ab,
    bench,
    build_engine,
    compare,
    demo,
    embed_dataset,
    export_onnx,
    health,
    libraries,
    onnx_profile,
    perf,
    profile,
    report,
    serialisation,
    serve,
    soak,
    swap,
    sweep,
    tune_precision,
    verify,
)

app = typer.Typer(
    name="clip-tools",
    help="Build, check, serve and measure the model repository.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# In the order of `clip-tools --help`.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
for verb in (
    health.health,
    demo.demo,
    swap.swap,
    embed_dataset.embed_dataset,
    export_onnx.export_onnx,
    build_engine.build_engine,
    verify.verify,
    tune_precision.tune_precision,
    bench.bench,
    perf.perf,
    serialisation.serialisation,
    onnx_profile.onnx_profile,
    report.report,
    ab.ab,
    compare.compare,
    profile.profile,
    sweep.sweep,
    libraries.libraries,
    soak.soak,
):
    app.command()(verb)


def main() -> None:
    """Run the command. A user's error is one line on stderr and an exit code."""
    proxy.bypass_for_localhost()
    try:
        with exits_with_reason("clip-tools"):
            app()
    except SystemExit as ended:
        if ended.code == 130:  # typer's exit code for Ctrl-C
            sys.stderr.write("clip-tools: interrupted\n")
        raise
