"""The verbs of `clip-tools` that measure; `clip_tools.cli` takes them in."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS, RESULTS, ROOT

app = typer.Typer()


Models = Annotated[Path, typer.Option(help="The model repository.", envvar="CLIP_MODELS")]
Images = Annotated[
    str, typer.Option(help="640x480 (real photographs of that size), phone (12 MP originals), or a folder of images.")
]


def numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` -> (1, 4, 16). Raises ToolError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ToolError(f"'{text}': expected whole numbers with commas, such as 1,4,16", exit_code=2) from error


def show(table: Any) -> None:
    """A table for people, on stderr, so that stdout holds data alone."""
    from rich.console import Console

    Console(stderr=True).print(table)


@app.command()
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
    rounds: Annotated[int, typer.Option(min=1, help="Every arm meets every cell once a round.")] = 5,
    seconds: Annotated[float, typer.Option(help="The window of one measurement.")] = 4.0,
    cold_starts: Annotated[int, typer.Option(min=0, help="Process start to first embedding, so many times.")] = 3,
    targets: Annotated[bool, typer.Option(help="Also measure what the targets need beyond the arms.")] = True,
    url: Annotated[
        str | None,
        typer.Option(help="A server that runs elsewhere with the same weights, grpc://HOST:8001; no targets then."),
    ] = None,
    pytorch_url: Annotated[
        str | None, typer.Option(help="The PyTorch service, where it runs elsewhere: http://HOST:8010.")
    ] = None,
    soak: Annotated[int, typer.Option(min=0, help="Watch the memory over so many requests; the target: 20000.")] = 0,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Only preprocess, alone: by its library and by Pillow, in the rounds.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The shortest run through everything; no figure counts.")] = (
        False
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Print each target with its figure; exit 1 when one is missed.")
    ] = False,
    result: Annotated[Path | None, typer.Option(help="With --check: judge this result, and measure nothing.")] = None,
    output: Annotated[
        Path, typer.Option(help="Where the JSON goes; an earlier one is kept, named by its time.")
    ] = RESULTS / "bench.json",
    models: Models = MODELS,
) -> None:
    """Embed the same photographs through every arm, in rounds, and compare."""
    from clip_tools.measuring import bench as verb
    from clip_tools.measuring import bench_section, results
    from clip_tools.measuring import preprocess as alone
    from clip_tools.measuring.targets import TARGETS
    from clip_tools.measuring.targets import check as judge
    from clip_tools.measuring.workload import ensure_model

    if result is None and (kept := results.keep_earlier(output)):
        typer.echo(f"the earlier {output.name} is {kept} now", err=True)
    if result is not None:
        measured = results.read(result)
    elif preprocess:
        with progress() as tell:
            measured = alone.preprocess_alone(
                rounds=1 if quick else rounds, seconds=0.1 if quick else seconds, models=models, tell=tell
            )
        results.write(measured, output)
        typer.echo(alone.preprocess_section(output.stem, measured).text)
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
        with progress() as tell:
            options = verb.quick(options) if quick else options
            measured = verb.bench(
                options, ensure_model(models), tell=tell, save=lambda partial: results.write(partial, output)
            )
        results.write(measured, output)
        typer.echo(bench_section.bench_text(measured))
    if check:
        verdicts = judge(measured, alone.TARGETS if measured["kind"] == "preprocess" else TARGETS)
        typer.echo(bench_section.verdicts_text(verdicts))
        if not all(verdict.is_met for verdict in verdicts):
            raise typer.Exit(1)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: what goes on, how much is done, how much there is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@app.command()
def perf(
    model: Annotated[str, typer.Option(help="clip_ensemble, or a step: preprocess, clip_onnx, clip_trt.")] = (
        "clip_ensemble"
    ),
    images: Images = "640x480",
    url: Annotated[str, typer.Option(help="The running server, HOST:PORT.")] = "localhost:8001",
    serve: Annotated[bool, typer.Option("--serve", help="Start the embedded server for the run.")] = False,
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="With --serve: the configuration that is served.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="grpc or http.")] = "grpc",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, each measured; empty for none.")] = "1,4,16",
    request_rate: Annotated[str, typer.Option(help="Requests a second, each measured; empty for none.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images a request.")] = 1,
    window_ms: Annotated[int, typer.Option(min=100, help="One measurement window.")] = 5000,
    max_trials: Annotated[int, typer.Option(min=1, help="Windows at most; three that agree are enough.")] = 10,
    stability_percent: Annotated[int, typer.Option(min=1, help="How far three windows may differ.")] = 10,
    output: Annotated[Path, typer.Option(help="Where the JSON goes; the picture goes beside it.")] = (
        RESULTS / "perf.json"
    ),
    write_input: Annotated[
        Path | None,
        typer.Option(
            help="Only write perf_analyzer's input JSON to this file, and run nothing. docs/container.md says what "
            "plain perf_analyzer needs of a server that other machines reach."
        ),
    ] = None,
    models: Models = MODELS,
) -> None:
    """Run the real perf_analyzer against a running server, with many different photographs."""
    import json

    from rich.console import Console

    from clip_tools.measuring import perf as verb
    from clip_tools.measuring.services import TritonService
    from clip_tools.measuring.variants import Variant

    options = verb.PerfOptions(
        model=model,
        images=images,
        url=url,
        protocol=protocol,
        concurrency=numbers(concurrency),
        request_rate=tuple(map(float, numbers(request_rate))),
        batch=batch,
        window_ms=window_ms,
        max_trials=max_trials,
        stability_percent=stability_percent,
        models=models,
    )
    if write_input:
        count = verb.write_input(options, write_input)
        typer.echo(f"{write_input}: {count} images for --input-data", err=True)
        return
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status("perf_analyzer"))
        if serve:
            service = TritonService(Variant(config_name), models)
            stack.callback(service.stop)
            address = service.options.grpc_url if protocol == "grpc" else service.options.http_url
            options = replace(options, url=address.split("://")[1])
        result = verb.perf(options, output, tell=lambda line: status.update(f"perf_analyzer: {line}"))
    show(verb.table(result))
    verb.explain(result)
    typer.echo(json.dumps(result["levels"]))


@app.command()
def serialisation(
    images: Images = "640x480",
    batches: Annotated[str, typer.Option(help="Images a message.")] = "1,2,4,8,16,32",
    runs: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 7,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "serialisation.json",
) -> None:
    """Bytes and time of JSON, binary FP32, binary uint8 and JPEG, without a server."""
    from rich.console import Console

    from clip_tools.measuring import results, sections
    from clip_tools.measuring import serialisation as verb

    with Console(stderr=True).status("encoding and decoding"):
        result = verb.serialisation(images, batches=numbers(batches), runs=runs)
    results.write(result, output)
    typer.echo(sections.serialisation_section(output.stem, result).text)


@app.command("onnx-profile")
def onnx_profile(
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="The configuration whose session is profiled.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of the scaling.")] = "1,2,4,8,16,32,64",
    operator_batch: Annotated[int, typer.Option(min=1, help="The batch that the operators are timed at.")] = 8,
    seconds: Annotated[float, typer.Option(help="For each batch size.")] = 2.0,
    beside: Annotated[
        Path | None, typer.Option(help="Another ONNX file of the same tensors, timed in turn with the served one.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "onnx-profile.json",
    models: Models = MODELS,
) -> None:
    """Where the engine's time goes: session creation, operators, providers of the nodes, scaling by batch."""
    from rich.console import Console

    from clip_tools.measuring import onnx_profile as verb
    from clip_tools.measuring import results, sections

    with Console(stderr=True).status("onnxruntime") as status:
        result = verb.onnx_profile(
            models=models,
            config_name=config_name,
            beside=beside,
            batches=numbers(batches),
            operator_batch=operator_batch,
            seconds=seconds,
            tell=lambda line: status.update(f"onnxruntime: {line}"),
        )
    results.write(result, output)
    verb.explain(result)
    section = sections.onnx_section(output.stem, result)
    for name, picture in section.pictures.items():
        (output.parent / name).write_text(picture)
    typer.echo(section.text)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where the results are; the report goes there too.")] = RESULTS,
) -> None:
    """Write benchmarks.md and its pictures from the results of a folder."""
    from clip_tools.measuring import report as verb

    for path in verb.report(folder):
        typer.echo(path)


@app.command()
def ab(
    url_a: Annotated[str, typer.Argument(help="A running server, grpc://HOST:8001.")],
    url_b: Annotated[str, typer.Argument(help="Another one.")],
    images: Images = "640x480",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images a request.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Both servers in turn, so many times.")] = 3,
    seconds: Annotated[float, typer.Option(help="The window of one measurement.")] = 8.0,
) -> None:
    """Ask two running servers for the same photographs in turns, and show their speed, times by step and vectors."""
    from clip_tools.measuring import ab as verb

    options = verb.AbOptions(images, batch=batch, concurrency=concurrency, rounds=rounds, seconds=seconds)
    with progress() as tell:
        measured, agreement = verb.ab((url_a, url_b), options, tell=tell)
    typer.echo(verb.text((url_a, url_b), measured, agreement))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result of clip-tools bench.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Say what changed between two results of bench, and whether it is more than noise."""
    from clip_tools.measuring import compare as verb
    from clip_tools.measuring import results

    typer.echo(verb.text(verb.compare(results.read(before), results.read(after))))


@app.command()
def profile(
    mode: Annotated[str, typer.Option(help="local (the embedded server), docker, or remote (a running server).")] = (
        "local"
    ),
    apply: Annotated[
        str | None, typer.Option(help="Write the winner as configs/NAME.pbtxt of the models that it changes.")
    ] = None,
    images: Images = "640x480",
    folder: Annotated[Path, typer.Option(help="All that Model Analyzer writes; a run goes on from here.")] = (
        RESULTS / "model-analyzer"
    ),
    config: Annotated[Path, typer.Option(help="Model Analyzer's configuration.")] = (
        ROOT / "tools" / "model_analyzer" / "ensemble.yaml"
    ),
    host: Annotated[str, typer.Option(help="Of the server in mode remote.")] = "localhost",
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
    docker_image: Annotated[str | None, typer.Option(help="The server image in mode docker.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two configurations, a few requests; no figure counts.")] = (
        False
    ),
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "profile.json",
    models: Models = MODELS,
) -> None:
    """Search the ensemble's best configuration with the real Model Analyzer."""
    from rich.console import Console

    from clip_tools.measuring import profile as verb
    from clip_tools.measuring import results, sections

    if mode not in verb.MODES:
        raise ToolError(f"--mode {mode}: expected {', '.join(verb.MODES)}", exit_code=2)
    options = verb.ProfileOptions(
        folder=folder,
        mode=mode,  # type: ignore[arg-type]
        images=images,
        config=config,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        docker_image=docker_image,
        quick=quick,
        models=models,
    )
    with Console(stderr=True).status("model-analyzer") as status:
        result = verb.profile(options, tell=lambda line: status.update(f"model-analyzer: {line}"))
    results.write(result, output)
    typer.echo(sections.tuning_section(output.stem, result).text)
    if apply:
        tell_applied(verb.apply(result, apply, folder / "repository", models), apply)


def tell_applied(paths: list[Path], name: str) -> None:
    """On stderr: which configurations were written, and how they are served."""
    for path in paths:
        typer.echo(f"written: {path}", err=True)
    how = f"serve it: clip-tools serve --model-config-name={name}" if paths else "the committed configuration is best"
    typer.echo(how, err=True)


@app.command()
def sweep(
    axes: Annotated[str, typer.Option(help="What to vary, in this order.")] = (
        "preprocess_instances,engine,max_batch,queue_delay_us"
    ),
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    images: Images = "640x480",
    window_ms: Annotated[int, typer.Option(min=100, help="perf_analyzer's window.")] = 5000,
    stability_percent: Annotated[int, typer.Option(min=1, help="How far three windows may differ.")] = 10,
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="The configuration to start from, such as cpu-bf16.")
    ] = None,
    also: Annotated[
        Path | None, typer.Option(help="A result of clip-tools profile, whose best is measured here too.")
    ] = None,
    apply: Annotated[
        str | None, typer.Option(help="Write the winner as configs/NAME.pbtxt of the models that it changes.")
    ] = None,
    log: Annotated[Path, typer.Option(help="Each point, a line of JSON; a run goes on from here.")] = (
        RESULTS / "sweep.jsonl"
    ),
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "sweep.json",
    models: Models = MODELS,
) -> None:
    """Search batch limit, queue delay, instances and threads with perf_analyzer: a cross-check of Model Analyzer."""
    from rich.console import Console

    from clip_tools.measuring import results, sections
    from clip_tools.measuring import sweep as verb
    from clip_tools.measuring.variants import committed_variant

    try:
        chosen = verb.axes_of([axis.strip() for axis in axes.split(",") if axis.strip()])
    except KeyError as error:
        raise ToolError(f"--axes {error}: expected some of {', '.join(verb.AXES)}", exit_code=2) from error
    start = committed_variant(models, config_name)
    rival = verb.variant_of(results.read(also)["best"], start) if also else None
    options = verb.SweepOptions(
        axes=chosen,
        images=images,
        concurrency=concurrency,
        window_ms=window_ms,
        stability_percent=stability_percent,
        config_name=config_name,
        also=(rival,) if rival else (),
        models=models,
        log=log,
    )
    with Console(stderr=True).status("sweep") as status:
        result = verb.sweep(options, tell=lambda line: status.update(f"sweep: {line}"))
    results.write(result, output)
    typer.echo(sections.tuning_section(output.stem, result).text)
    if apply:
        tell_applied(verb.apply(result, apply, models), apply)


@app.command()
def libraries(
    rows: Annotated[int, typer.Option(min=1000, help="How many synthetic vectors.")] = 100_000,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "libraries.json",
    models: Models = MODELS,
) -> None:
    """How fast `clip-embed search` and `duplicates` are, and which edits are found at which threshold."""
    from clip_tools.measuring import libraries as verb
    from clip_tools.measuring import results

    with progress() as tell:
        result = verb.libraries(rows=rows, models=models, tell=tell)
    results.write(result, output)
    typer.echo(verb.libraries_section(output.stem, result).text)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the traffic lasts.")] = 60.0,
    clients: Annotated[int, typer.Option(min=1, help="How many call at once, each over its own connection.")] = 8,
    bad_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="How many of the calls are bad.")] = 0.1,
    url: Annotated[
        str | None, typer.Option(help="A running server of this machine, grpc://HOST:PORT; else one is started.")
    ] = None,
    config_name: Annotated[
        str | None, typer.Option("--model-config-name", help="The configuration that is served.")
    ] = None,
    images: Images = "640x480",
    seed: Annotated[int, typer.Option(help="The same seed, the same calls of each client.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the JSON goes; the picture goes beside it.")] = (
        RESULTS / "soak.json"
    ),
    models: Models = MODELS,
) -> None:
    """Send good and bad traffic for an hour and watch the server; exit 1 when something was lost or grew."""
    from clip_tools.measuring import results, sections
    from clip_tools.measuring import soak as verb

    options = verb.SoakOptions(
        minutes=minutes,
        clients=clients,
        bad_share=bad_share,
        url=url,
        config_name=config_name,
        images=images,
        seed=seed,
        models=models,
    )
    with progress() as tell:
        result = verb.soak(options, tell=tell)
    results.write(result, output)
    section = sections.soak_section(output.stem, result)
    for name, picture in section.pictures.items():
        (output.parent / name).write_text(picture)
    typer.echo(section.text)
    if result["problems"]:
        raise typer.Exit(1)
