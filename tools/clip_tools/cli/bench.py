"""The options of `clip-tools bench`."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Images, Models, finish, numbers, progress
from clip_tools.paths import MODELS, RESULTS


def bench(
    arms: Annotated[
        str,
        typer.Option(
            help="What to compare, with commas: KIND[@CONFIG][:INSTANCES], kinds as in measuring/arms.py. By default "
            "ensemble-grpc,ensemble-http,tensor-grpc,json-http,pytorch, on a GPU with model.fp16.onnx also "
            "ensemble-grpc@ort-fp16,pytorch@fp16."
        ),
    ] = "",
    images: Images = "640x480",
    image_count: Annotated[int, typer.Option(min=1, help="The maximum number of different photographs.")] = 32,
    batches: Annotated[str, typer.Option(help="Images per request, with one request in flight.")] = "1,4,8,16,32",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, of one image each.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="How often to measure every arm, in turns.")] = 5,
    seconds: Annotated[float, typer.Option(help="The duration of one measurement.")] = 4.0,
    cold_starts: Annotated[
        int, typer.Option(min=0, help="How often to time each server from its start to its first embedding.")
    ] = 3,
    targets: Annotated[bool, typer.Option(help="Also measure what only the targets need.")] = True,
    url: Annotated[
        str | None,
        typer.Option(help="A running server with the same weights, grpc://HOST:8001; skips the targets."),
    ] = None,
    pytorch_url: Annotated[str | None, typer.Option(help="A running PyTorch service, http://HOST:8010.")] = None,
    soak: Annotated[
        int, typer.Option(min=0, help="Watch the memory for this many requests; the target requires 20000.")
    ] = 0,
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
    models: Models = MODELS,
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
        measured = results.read(result)
    elif preprocess:
        rounds, seconds = (1, 0.1) if quick else (rounds, seconds)
        with progress() as tell:
            measured = alone.preprocess_alone(rounds=rounds, seconds=seconds, models=models, tell=tell)
        finish(measured, output)
    else:
        options = verb.BenchOptions(
            arms=tuple(arm.strip() for arm in arms.split(",") if arm.strip()),
            images=images,
            image_count=image_count,
            batches=numbers(batches),
            concurrency=numbers(concurrency),
            rounds=rounds,
            seconds=seconds,
            cold_starts=cold_starts,
            for_targets=targets,
            soak_requests=soak,
            url=url,
            pytorch_url=pytorch_url,
            models=models,
        )
        if note := verb.left_out(options):
            typer.echo(note, err=True)
        options = verb.quick(options) if quick else options
        with progress() as tell:
            measured = verb.bench(
                options, ensure_model(models), tell=tell, save=lambda partial: results.write(partial, output)
            )
        finish(measured, output)
    if check:
        chosen = alone.TARGETS if measured["kind"] == "preprocess" else promises.TARGETS
        verdicts = promises.check(measured, chosen)
        if result is not None:
            typer.echo(promises.verdicts_text(verdicts))
        if not all(verdict.is_met for verdict in verdicts):
            raise typer.Exit(1)
