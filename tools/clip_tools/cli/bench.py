"""`clip-tools bench`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from clip_tools.cli.options import measured, takes
from clip_tools.measuring.options import BenchOptions
from clip_tools.paths import RESULTS
from clip_tools.progress import Tell


@takes(BenchOptions)
def bench(
    options: BenchOptions,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Measure preprocess alone, with its C resampler and with Pillow.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minimal run of everything; its figures do not count.")] = (
        False
    ),
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if a target is missed.")] = False,
    result: Annotated[
        Path | None, typer.Option(help="With --check: check the targets of this result, and measure nothing.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Where to write the JSON, and its pictures beside it; an earlier one is renamed by its time."
        ),
    ] = RESULTS / "bench.json",
) -> None:
    """Measure and compare the arms: several ways to embed the same photographs, in rounds."""
    from clip_tools.measuring import bench as verb
    from clip_tools.measuring import preprocess as alone
    from clip_tools.measuring import results
    from clip_tools.measuring import targets as promises
    from clip_tools.measuring.workload import ensure_model

    if result is None and (kept := results.keep_earlier(output)):
        typer.echo(f"the earlier {output.name} is {kept} now", err=True)
    if result is not None:
        found = results.read(result)
    elif preprocess:
        options = replace(options, rounds=1, seconds=0.1) if quick else options
        found = measured(alone.preprocess_alone, options, output)
    else:
        if note := verb.left_out(options):
            typer.echo(note, err=True)

        def run(asked: BenchOptions, *, tell: Tell) -> dict[str, Any]:
            weights = ensure_model(asked.models)
            return verb.bench(asked, weights, tell=tell, save=lambda partial: results.write(partial, output))

        found = measured(run, verb.quick(options) if quick else options, output)
    if check:
        wanted = alone.TARGETS if found["kind"] == "preprocess" else promises.TARGETS
        verdicts = promises.check(found, wanted)
        if result is not None:
            typer.echo(promises.verdicts_text(verdicts))
        if not all(verdict.is_met for verdict in verdicts):
            raise typer.Exit(1)
