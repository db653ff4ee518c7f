"""`clip-tools bench`, its options."""

from pathlib import Path
from typing import Annotated

import typer

from clip_tools.cli.options import Images, Models, finish, numbers, progress
from clip_tools.paths import MODELS, RESULTS


def bench(
    arms: Annotated[
        str,
        typer.Option(
            help="With commas: KIND[@CONFIG][:INSTANCES]; see measuring/arms.py for the kinds. By default "
            "ensemble-grpc,ensemble-http,tensor-grpc,json-http,pytorch, on a GPU with model.fp16.onnx also "
            "ensemble-grpc@ort-fp16,pytorch@fp16."
        ),
    ] = "",
    images: Images = "640x480",
    image_count: Annotated[int, typer.Option(min=1, help="How many different photographs, at most.")] = 32,
    batches: Annotated[str, typer.Option(help="Images a request, one request at a time.")] = "1,4,8,16,32",
    concurrency: Annotated[str, typer.Option(help="Requests of one image at once.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="How often every arm is measured, in turn.")] = 5,
    seconds: Annotated[float, typer.Option(help="The window of one measurement.")] = 4.0,
    cold_starts: Annotated[
        int, typer.Option(min=0, help="How often each server's start to its first embedding is timed.")
    ] = 3,
    targets: Annotated[bool, typer.Option(help="Also measure what the targets need beyond the arms.")] = True,
    url: Annotated[
        str | None,
        typer.Option(help="A server that runs elsewhere with the same weights, grpc://HOST:8001; no targets then."),
    ] = None,
    pytorch_url: Annotated[
        str | None, typer.Option(help="The PyTorch service, where it runs elsewhere: http://HOST:8010.")
    ] = None,
    soak: Annotated[
        int, typer.Option(min=0, help="Watch the memory over this many requests; the target needs 20000.")
    ] = 0,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Measure preprocess alone, resizing by its library and by Pillow.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The shortest run through everything; no figure counts.")] = (
        False
    ),
    check: Annotated[bool, typer.Option("--check", help="Exit 1 when a target is missed.")] = False,
    result: Annotated[
        Path | None, typer.Option(help="With --check: print the targets of this result, and measure nothing.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(help="Where the JSON goes, its pictures beside it; an earlier one is kept, named by its time."),
    ] = RESULTS / "bench.json",
    models: Models = MODELS,
) -> None:
    """Embed the same photographs through every arm, in rounds, and compare."""
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
        wanted = alone.TARGETS if measured["kind"] == "preprocess" else promises.TARGETS
        verdicts = promises.check(measured, wanted)
        if result is not None:
            typer.echo(promises.verdicts_text(verdicts))
        if not all(verdict.is_met for verdict in verdicts):
            raise typer.Exit(1)
