"""`clip-tools bench`: embeds the same photographs through every arm, in rounds, so that drift affects all alike."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.gpu import find_gpu
from clip_tools.in_process import runs_here
from clip_tools.measuring import steps
from clip_tools.measuring.arms import Arm
from clip_tools.measuring.bare import Worker
from clip_tools.measuring.cells import Cell
from clip_tools.measuring.load import measure, rounded
from clip_tools.measuring.options import BenchOptions, PerfOptions
from clip_tools.measuring.perf import perf_input, run_level
from clip_tools.measuring.results import begin
from clip_tools.measuring.sections import not_settled
from clip_tools.measuring.services import Deployment, Service, deployed
from clip_tools.measuring.targets import BUSY, TARGETS
from clip_tools.measuring.timing import OwnProcess, in_turn
from clip_tools.measuring.watch import resident_mib
from clip_tools.measuring.workload import Workload, load_workload
from clip_tools.oracle import Weights
from clip_tools.progress import Tell, silent
from clip_tools.repository import config_names

ARMS = ("ensemble-grpc", "ensemble-http", "tensor-grpc", "json-http", "pytorch")
FP16_ARMS = ("ensemble-grpc@ort-fp16", "pytorch@fp16")  # beside them on a GPU
REMOTE_KINDS = ("ensemble-grpc", "perf-analyzer", "pytorch")
SOAK_STEP = 1_000


def quick(options: BenchOptions) -> BenchOptions:
    """The shortest run that goes through everything once; its figures mean nothing."""
    few: dict[str, Any] = {"image_count": 4, "batches": (1, 4), "concurrency": (1, 2), "rounds": 1, "cold_starts": 0}
    return replace(options, seconds=0.2, warmup_s=0.0, at_least=1, for_targets=False, **few)


def default_arms(models: Path, *, has_gpu: bool, is_remote: bool) -> tuple[str, ...]:
    """The arms of a run that names none: on a GPU also those in FP16, if their graph was exported."""
    if is_remote:
        return ("ensemble-grpc", "pytorch")
    return ARMS + FP16_ARMS if has_gpu and (models / "clip_onnx" / "1" / "model.fp16.onnx").is_file() else ARMS


def left_out(options: BenchOptions) -> str:
    """How to get the arms in FP16 into a run that names no arms; empty if it has them, or without a GPU."""
    if options.arms or options.url or options.pytorch_url or find_gpu() is None:
        return ""
    if default_arms(options.models, has_gpu=True, is_remote=False) != ARMS:
        return ""
    return f"left out: {', '.join(FP16_ARMS)}; `clip-tools export-onnx --precision fp16` makes their graph"


def complete(options: BenchOptions) -> BenchOptions:
    """The options with their arms. Raises ToolError for what cannot be asked of servers that run elsewhere."""
    is_remote = bool(options.url or options.pytorch_url)
    arms = options.arms or default_arms(options.models, has_gpu=find_gpu() is not None, is_remote=is_remote)
    if is_remote and options.soak_requests:
        raise ToolError("--soak watches a server of this machine: leave out --url and --pytorch-url", exit_code=2)
    for arm in map(Arm.parse, arms if options.url else ()):
        variant = arm.kind != "pytorch" and (arm.config_name or arm.preprocess_instances)
        if arm.kind not in REMOTE_KINDS or variant:
            expected = f"with --url expected {', '.join(REMOTE_KINDS)}"
            raise ToolError(f"{arm.name} needs a server that is started for it: {expected}", exit_code=2)
    if is_remote:
        options = replace(options, for_targets=False, cold_starts=0)
    return replace(options, arms=arms)


def target_configs(models: Path) -> list[str]:
    """The named configurations that targets measure, without those whose provider is not installed here."""
    wanted = {Arm.parse(cell.arm).config_name for target in TARGETS for cell in target.cells}
    return [name for name in config_names(models) if name in wanted and runs_here(models, name)]


def plan(options: BenchOptions, known_configs: list[str]) -> list[Cell]:
    """The cells of one round, each once; those of one batch size and concurrency side by side.

    Raises ToolError for an arm that is none. A target's cell is left out when its configuration does not exist.
    """
    shapes = [(batch, 1) for batch in options.batches] + [(1, c) for c in options.concurrency if c > 1]
    cells = [Cell(Arm.parse(arm).name, options.images, *shape) for shape in shapes for arm in options.arms or ARMS]
    for target in TARGETS if options.for_targets else ():
        cells += [cell for cell in target.cells if Arm.parse(cell.arm).config_name in (None, *known_configs)]
    return sorted(dict.fromkeys(cells), key=lambda cell: (cell.images, cell.concurrency, cell.batch))


def in_rounds(cells: list[Cell], rounds: int) -> Iterator[tuple[int, Cell]]:
    """Every cell once a round; within one shape the arms take turns at going first."""
    shapes: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in cells:
        shapes.setdefault((cell.images, cell.batch, cell.concurrency), []).append(cell)
    for number in range(rounds):
        for group in shapes.values():
            yield from ((number, cell) for cell in in_turn(group, number))


def bench(
    options: BenchOptions,
    weights: Weights,
    *,
    tell: Tell = silent,
    save: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """The whole run as one JSON-able result. Raises ToolError when a request fails or an answer is wrong.

    `save` is given the result after each round, so that a run that is stopped leaves what it measured.
    """
    options = complete(options)
    cells = plan(options, target_configs(options.models) if options.for_targets else [])
    if not cells:
        raise ToolError("nothing to measure: name an arm, a batch size or a concurrency", exit_code=2)
    result = begin("bench")
    result["weights"] = {"model": weights.model, "trained": weights.seed is None}
    result["options"] = {key: value for key, value in asdict(options).items() if key != "models"}
    total = len(cells) * options.rounds
    tell("open_clip's own embeddings of the photographs", 0, total)
    names = dict.fromkeys([options.images, *(cell.images for cell in cells)])
    workloads = {name: load_workload(name, weights, count=options.image_count) for name in names}
    result["images"] = {
        name: {"count": len(workload.images), "mean_size_bytes": workload.mean_size_bytes}
        for name, workload in workloads.items()
    }
    result["cold_start"] = list(_cold_starts(options, weights, tell))
    arms = tuple(dict.fromkeys(Arm.parse(cell.arm) for cell in cells))
    with ExitStack() as stack:
        tell("starting the servers", 0, total)
        deployment = stack.enter_context(
            deployed(arms, weights, options.models, url=options.url, pytorch_url=options.pytorch_url)
        )
        result["devices"] = {arm.name: deployment.device(arm) for arm in arms}
        bare = None
        if options.for_targets:
            bare = stack.enter_context(OwnProcess(Worker, options.models, workloads[options.images].images))
        result["cells"], result["bare"] = [], []
        for done, (number, cell) in enumerate(in_rounds(cells, options.rounds)):
            if bare and (part := bare_part(cell, number, result["bare"], options)):
                tell(f"round {number + 1}: preprocess and engine alone", done, total)
                result["bare"][-1] |= bare.ask(part, options.seconds)
            tell(f"round {number + 1}: {cell.arm}, batch {cell.batch}, concurrency {cell.concurrency}", done, total)
            row = _measure(deployment, cell, workloads[cell.images], options)
            result["cells"].append({**asdict(cell), "round": number, **row})
            if (done + 1) % len(cells) == 0:
                save(result)
        result["servers"] = {name: _state(one) for name, one in deployment.services.items() if one.pid}
    if options.soak_requests:
        result["soak"] = list(_soak(options, weights, workloads[options.images], tell))
    return result


def bare_part(cell: Cell, number: int, bare: list[dict[str, Any]], options: BenchOptions) -> str | None:
    """The method of `Worker` to call before this cell: each once a round, next to the cell that it is compared with."""
    if not bare or bare[-1]["round"] != number:
        bare.append({"round": number})
    if (cell.images, cell.batch) != (options.images, 1):
        return None
    if cell.concurrency == 1:
        return None if "single_ms" in bare[-1] else "single"
    return None if "engine_s" in bare[-1] or cell.concurrency < BUSY else "steps"


def _measure(deployment: Deployment, cell: Cell, workload: Workload, options: BenchOptions) -> dict[str, Any]:
    arm = Arm.parse(cell.arm)
    service = deployment.services[arm.server]
    if arm.kind == "perf-analyzer":
        return _by_perf_analyzer(service, cell, workload, options)
    caller = deployment.caller(arm, workload)
    return measure(
        caller.ask,
        caller.check,
        len(workload.images),
        batch=cell.batch,
        concurrency=cell.concurrency,
        seconds=options.seconds,
        warmup_s=options.warmup_s,
        at_least=options.at_least,
        triton_url=None if arm.kind == "pytorch" else service.url,
        pid=service.pid,
    )


def _by_perf_analyzer(service: Service, cell: Cell, workload: Workload, options: BenchOptions) -> dict[str, Any]:
    """perf_analyzer over three windows that add up to `seconds`. They may differ by any amount, as other arms' may."""
    with tempfile.TemporaryDirectory() as folder:
        input_file = Path(folder) / "input.json"
        input_file.write_text(perf_input(workload.images, "clip_ensemble", options.models))
        asked = PerfOptions(
            url=service.url.removeprefix("grpc://"),
            batch=cell.batch,
            window_ms=max(1000, int(1000 * options.seconds / 3)),  # shorter ones can see no request end
            max_trials=10,  # three that hold any request at all are enough; on a busy machine a window can be empty
            stability_percent=999,
            models=options.models,
        )
        level = run_level(asked, "concurrency", cell.concurrency, input_file)
    times = {f"{p}_ms": level["latency_ms"].get(p) for p in ("p50", "p95", "p99")}
    row: dict[str, Any] = {"throughput": level["throughput"], "requests": None, **times, "agreement": None}
    if not level["settled"]:  # at this tolerance: there were windows in which no request ended
        row |= {"throughput": statistics.mean(level["windows"]), "not_settled": not_settled(level)}
    return row


def _cold_starts(options: BenchOptions, weights: Weights, tell: Tell) -> Iterator[dict[str, Any]]:
    """Process start to first embedding, s, alone on the machine; the files are in the page cache.

    Once for each server: arms that share one are named by the first of them.
    """
    servers: dict[str, Arm] = {}
    for arm in map(Arm.parse, options.arms):
        servers.setdefault(arm.server, arm)
    for number in range(options.cold_starts):
        for arm in servers.values():
            tell(f"cold start {number + 1} of {options.cold_starts}: {arm.name}")
            with deployed((arm,), weights, options.models) as deployment:
                start_s = deployment.services[arm.server].start_s
                yield {"arm": arm.name, "round": number, "start_s": rounded(start_s)}


def _state(service: Service) -> dict[str, Any]:
    """A server's memory at the end, and its Prometheus metrics where it has any."""
    state: dict[str, Any] = {"memory_mib": round(resident_mib(service.pid), 1)}
    if service.metrics_url:
        state["metrics"] = steps.metrics(service.metrics_url)
    return state


def _soak(options: BenchOptions, weights: Weights, workload: Workload, tell: Tell) -> Iterator[dict[str, Any]]:
    """The memory of a fresh server after each thousand requests."""
    from concurrent.futures import ThreadPoolExecutor

    arm, total = Arm("ensemble-grpc"), options.soak_requests
    with deployed((arm,), weights, options.models) as deployment, ThreadPoolExecutor(16) as pool:
        caller, service = deployment.caller(arm, workload), deployment.services[arm.server]
        for done in range(0, total, SOAK_STEP):
            tell("soak: requests", done, total)
            turns = range(done, min(done + SOAK_STEP, total))
            indices = [[turn % len(workload.images)] for turn in turns]
            for index, answer in zip(indices, pool.map(caller.ask, indices), strict=True):
                caller.check(index, answer)
            yield {"requests": turns.stop, "memory_mib": round(resident_mib(service.pid), 1)}
