"""`clip-tools onnx-profile`: where the engine's time goes: session creation, operators, providers, batch sizes."""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError, missing_extra
from clip_tools.export.external_data import load_nodes
from clip_tools.measuring.bare import engine_plan, open_engine
from clip_tools.measuring.fingerprint import fingerprint
from clip_tools.paths import MODELS

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_PAIRED_ROUNDS = 15


@dataclass(frozen=True)
class Scaling:
    """One batch size on the served session. `median_ms` is a run's time, `throughput` in images a second."""

    batch: int
    median_ms: float
    throughput: float


@dataclass(frozen=True)
class Operators:
    """ONNX Runtime's own profile of one provider: ms a run by operator, and how many nodes each provider took.

    `operators_by_provider` says which they are. `fused` is True where a provider took the graph as a whole: its inside
    cannot be seen from here.
    """

    provider: str
    batch: int
    created_s: float
    run_ms: float
    by_operator_ms: dict[str, float]
    nodes_by_provider: dict[str, int]
    operators_by_provider: dict[str, dict[str, int]]
    fused: bool


@dataclass(frozen=True)
class Paired:
    """The served graph and another, in turn on one provider: the median ms of a run of each.

    `ratio` is the median of the other's time over the served one's: above 1 the served graph is faster.
    """

    provider: str
    batch: int
    served_ms: float
    other_ms: float
    ratio: float
    ratio_lowest: float
    ratio_highest: float


def onnx_profile(
    *,
    models: Path = MODELS,
    config_name: str | None = None,
    beside: Path | None = None,
    batches: Sequence[int] = BATCHES,
    operator_batch: int = 8,
    seconds: float = 2.0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The served session by batch size, and the profile of its provider.

    Where that runs the graph as one fused node, as OpenVINO does, the profile of ONNX Runtime's own CPU provider too,
    which shows the operators. `beside` is another ONNX file of the same tensors, timed in turn with the served one.
    Raises ToolError for what is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("cpu", error) from error
    model, plan = engine_plan(models, config_name)
    if plan.parts:
        raise ToolError(f"'{config_name}' is a mix of precisions in several files: profile `onnx` or `cpu-bf16` for it")
    if beside and not beside.is_file():
        raise ToolError(f"--beside {beside}: no such file", exit_code=2)
    tell("creating the served session")
    begin = time.perf_counter()
    session = open_engine(models, config_name)
    created_s = time.perf_counter() - begin
    providers = list(session.get_providers())
    scaling = []
    for batch in batches:
        tell(f"batch {batch}")
        scaling.append(_scale(session, batch, seconds))
    del session
    profiles = []
    for provider, options in (plan.providers[0], ("CPUExecutionProvider", {})):
        tell(f"operators under {provider}")
        profiles.append(_operators(onnxruntime, model, provider, options, operator_batch))
        if not profiles[-1].fused:
            break
    paired: dict[str, Any] = {}
    if beside:
        tell(f"in turn with {beside.name}")
        paired["beside"] = _compare(
            onnxruntime, model, beside, plan, sorted({min(batches), operator_batch, max(batches)})
        )
    return {
        "kind": "onnx-profile",
        "environment": asdict(fingerprint()),
        "config_name": config_name,
        "session": {"created_s": round(created_s, 3), "providers": providers},
        "scaling": [asdict(row) for row in scaling],
        "operators": [asdict(profile) for profile in profiles],
        **paired,
    }


def _compare(onnxruntime: Any, served: Path, other: Path, plan: Any, batches: Sequence[int]) -> dict[str, Any]:
    """Nodes, agreement with open_clip on the sample beside the served graph, and the times of both, in turn."""
    from clip_tools.export.tune_precision import embed, times
    from clip_tools.verification.gates import cosines
    from clip_tools.verification.sample import Sample

    def session(path: Path, provider: tuple[str, dict[str, str]]) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = plan.intra_op_threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(path), options, providers=[provider, ("CPUExecutionProvider", {})])

    sample = Sample.read(served)
    if sample is None:
        raise ToolError(f"{served} has no sample.npz beside it: make both with `clip-tools export-onnx`")
    worst: dict[str, float] = {}
    rows = []
    for provider in dict([plan.providers[0], ("CPUExecutionProvider", {})]).items():
        pair = [session(served, provider), session(other, provider)]
        for path, one in zip((served, other), pair, strict=True):
            found = float(cosines(embed(one, sample.inputs), sample.embeddings).min())
            worst[str(path)] = min(found, worst.get(str(path), 1.0))
        for batch in batches:
            seconds = times(pair[0], pair[1], _pixels(batch), _PAIRED_ROUNDS)
            ratios = [b / a for a, b in seconds]
            medians = [round(1000 * statistics.median(column), 3) for column in zip(*seconds, strict=True)]
            bounds = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
            rows.append(Paired(provider[0], batch, *medians, *bounds))
    graphs = [
        {"file": path.name, "nodes": len(load_nodes(path).graph.node), "worst_cosine": round(worst[str(path)], 7)}
        for path in (served, other)
    ]
    return {"graphs": graphs, "photographs": len(sample.inputs), "times": [asdict(row) for row in rows]}


def _pixels(batch: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)


def _scale(session: Any, batch: int, seconds: float) -> Scaling:
    feed = {"pixels": _pixels(batch)}
    session.run(["embedding"], feed)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        begin = time.perf_counter()
        session.run(["embedding"], feed)
        times.append(time.perf_counter() - begin)
    median_s = statistics.median(times)
    return Scaling(batch, round(1000 * median_s, 3), round(batch / median_s, 2))


def _operators(
    onnxruntime: Any, model: Path, provider: str, provider_options: dict[str, str], batch: int, *, runs: int = 5
) -> Operators:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 3
        # Not as a CUDA graph, whose nodes cannot be seen one by one.
        seen = {key: value for key, value in provider_options.items() if key != "enable_cuda_graph"}
        chosen = [provider] if provider == "CPUExecutionProvider" else [(provider, seen)]
        begin = time.perf_counter()
        session = onnxruntime.InferenceSession(str(model), options, providers=chosen)
        created_s = time.perf_counter() - begin
        for _ in range(runs + 1):
            session.run(["embedding"], {"pixels": _pixels(batch)})
        events = json.loads(Path(session.end_profiling()).read_text())
    by_operator_ms, operators = summarise(events, runs)
    nodes = {provider: sum(counts.values()) for provider, counts in operators.items()}
    runs_ms = [event["dur"] / 1000 for event in events if event.get("name") == "model_run"][1:]
    return Operators(
        provider=provider,
        batch=batch,
        created_s=round(created_s, 3),
        run_ms=round(statistics.median(runs_ms), 3),
        by_operator_ms=by_operator_ms,
        nodes_by_provider=nodes,
        operators_by_provider=operators,
        fused=sum(nodes.values()) <= 2,
    )


def summarise(events: Sequence[dict[str, Any]], runs: int) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """(ms a run by operator, most first; how many of each by provider) of ONNX Runtime's profile, less its first run.

    The profile has an event for each node and run: category `Node`, a name that ends in `_kernel_time`, µs.
    """
    times: dict[str, list[float]] = defaultdict(list)
    provider_of: dict[str, str] = {}
    operator_of: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1000)
            operator_of[event["name"]] = event["args"].get("op_name", "?")
            provider_of[event["name"]] = event["args"].get("provider", "?")
    totals: dict[str, float] = defaultdict(float)
    for name, durations in times.items():
        totals[_short(operator_of[name])] += sum(durations[-runs:]) / runs
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    operators: dict[str, Counter[str]] = defaultdict(Counter)
    for name, provider in provider_of.items():
        operators[provider][_short(operator_of[name])] += 1
    return (
        {name: round(value, 4) for name, value in ordered},
        {provider: dict(counts.most_common()) for provider, counts in operators.items()},
    )


def _short(operator: str) -> str:
    """A fused subgraph's name holds a digest: `OpenVINOExecutionProvider_OpenVINO-EP-subgraph_1_...`."""
    return "OpenVINO, the whole graph" if operator.startswith("OpenVINO") else operator


def explain(result: dict[str, Any]) -> None:
    """On stderr: what the profile cannot show."""
    for profile in result["operators"]:
        if profile["fused"]:
            sys.stderr.write(
                f"{profile['provider']} runs the graph as one node: ONNX Runtime sees its time, not its inside\n"
            )
