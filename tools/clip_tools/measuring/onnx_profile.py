"""`clip-tools onnx-profile`: where the engine's time goes: session creation, operators, providers, batch sizes."""

import functools
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_tools.errors import ToolError, needs_extra
from clip_tools.export.external_data import load_nodes
from clip_tools.in_process import engine_settings, open_engine
from clip_tools.measuring.noise import paired_ratio
from clip_tools.measuring.options import OnnxProfileOptions
from clip_tools.measuring.results import begin
from clip_tools.measuring.timing import times_of
from clip_tools.progress import Tell, silent

_CPU = "CPUExecutionProvider"
_PAIRED_ROUNDS = 15
_RUNS = 5  # of the profile


def onnx_profile(options: OnnxProfileOptions, *, tell: Tell = silent) -> dict[str, Any]:
    """The served session by batch size, and the profile of its provider.

    If that runs the graph as one fused node, as OpenVINO does, the CPU provider is profiled too, which shows the
    operators. `beside` is another ONNX file of the same tensors, timed in turn with the served one.
    Raises ToolError for what is missing.
    """
    result, beside, operator_batch = begin("onnx-profile"), options.beside, options.operator_batch
    model, settings = engine_settings(options.models, options.config_name)
    if settings.parts:
        raise ToolError(
            f"'{options.config_name}' is a mix of precisions in several files: profile `onnx` or `cpu-bf16` for it"
        )
    if beside and not beside.is_file():
        raise ToolError(f"--beside {beside}: no such file", exit_code=2)
    tell("creating the served session")
    begin_s = time.perf_counter()
    session = open_engine(options.models, options.config_name)
    created = {"created_s": round(time.perf_counter() - begin_s, 3), "providers": list(session.get_providers())}
    scaling = []
    for done, batch in enumerate(options.batches):
        tell(f"batch {batch}", done, len(options.batches))
        run = functools.partial(session.run, ["embedding"])
        median_s = statistics.median(times_of(run, [{"pixels": _pixels(batch)}] * 3, options.seconds))
        row = {"batch": batch, "median_ms": round(1000 * median_s, 3), "throughput": round(batch / median_s, 2)}
        scaling.append(row)
    del session, run
    result |= {"config_name": options.config_name, "session": created, "scaling": scaling, "operators": []}
    for provider, provider_options in (settings.providers[0], (_CPU, {})):
        tell(f"operators under {provider}")
        result["operators"].append(_operators(model, provider, provider_options, operator_batch))
        if not result["operators"][-1]["fused"]:
            break
    if beside:
        tell(f"in turn with {beside.name}")
        result["beside"] = _compare(
            model, beside, settings, sorted({min(options.batches), operator_batch, max(options.batches)})
        )
    return result


def _open(path: Path, provider: str, provider_options: dict[str, str], **options: Any) -> Any:
    """A session with this provider, and the CPU's after it."""
    with needs_extra("cpu"):
        import onnxruntime
    given = onnxruntime.SessionOptions()
    for name, value in ({"log_severity_level": 3} | options).items():
        setattr(given, name, value)
    providers = [(provider, provider_options)] + ([(_CPU, {})] if provider != _CPU else [])
    return onnxruntime.InferenceSession(str(path), given, providers=providers)


def _pixels(batch: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)


def _compare(served: Path, other: Path, settings: Any, batches: Sequence[int]) -> dict[str, Any]:
    """Nodes, agreement with open_clip on the sample beside the served graph, and the times of both, in turn.

    `ratio` is the median of the other's time over the served one's: above 1 the served graph is faster.
    """
    from clip_tools.accuracy.gates import cosines
    from clip_tools.accuracy.sample import Sample
    from clip_tools.export.tune_precision import embed, times

    sample = Sample.read(served)
    if sample is None:
        raise ToolError(f"{served} has no sample.npz beside it: make both with `clip-tools export-onnx`")
    worst = [1.0, 1.0]
    rows = []
    for provider, options in dict([settings.providers[0], (_CPU, {})]).items():
        pair = [
            _open(path, provider, options, intra_op_num_threads=settings.intra_op_threads) for path in (served, other)
        ]
        agreements = [float(cosines(embed(one, sample.inputs), sample.embeddings).min()) for one in pair]
        worst = list(map(min, worst, agreements))
        for batch in batches:
            ours, theirs = zip(*times(pair[0], pair[1], _pixels(batch), _PAIRED_ROUNDS), strict=True)
            ratio = paired_ratio(theirs, ours)
            figures = (1000 * statistics.median(ours), 1000 * statistics.median(theirs))
            keys = ("served_ms", "other_ms", "ratio", "ratio_lowest", "ratio_highest")
            values = (round(one, 3) for one in (*figures, ratio.median, ratio.lowest, ratio.highest))
            rows.append({"provider": provider, "batch": batch, **dict(zip(keys, values, strict=True))})
    graphs = [
        {"file": path.name, "nodes": len(load_nodes(path).graph.node), "worst_cosine": round(cosine, 7)}
        for path, cosine in zip((served, other), worst, strict=True)
    ]
    return {"graphs": graphs, "photographs": len(sample.inputs), "times": rows}


def _operators(model: Path, provider: str, provider_options: dict[str, str], batch: int) -> dict[str, Any]:
    """ONNX Runtime's own profile of one provider: ms a run by operator, and the nodes that each provider took.

    `fused` is True where a provider took the graph as a whole: its inside cannot be seen from here.
    """
    # Not as a CUDA graph, whose nodes cannot be seen one by one.
    seen = {key: value for key, value in provider_options.items() if key != "enable_cuda_graph"}
    with tempfile.TemporaryDirectory() as folder:
        begin_s = time.perf_counter()
        prefix = str(Path(folder) / "profile")
        session = _open(model, provider, seen, enable_profiling=True, profile_file_prefix=prefix)
        created_s = time.perf_counter() - begin_s
        for _ in range(_RUNS + 1):
            session.run(["embedding"], {"pixels": _pixels(batch)})
        events = json.loads(Path(session.end_profiling()).read_text())
    by_operator_ms, operators = summarise(events, _RUNS)
    nodes = {name: sum(counts.values()) for name, counts in operators.items()}
    runs_ms = [event["dur"] / 1000 for event in events if event.get("name") == "model_run"][1:]
    return {
        "provider": provider,
        "batch": batch,
        "created_s": round(created_s, 3),
        "run_ms": round(statistics.median(runs_ms), 3),
        "by_operator_ms": by_operator_ms,
        "nodes_by_provider": nodes,
        "operators_by_provider": operators,
        "fused": sum(nodes.values()) <= 2,
    }


def summarise(events: Sequence[dict[str, Any]], runs: int) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """(ms a run by operator, most first; how many of each by provider) of ONNX Runtime's profile, less its first run.

    The profile has an event for each node and run: category `Node`, a name that ends in `_kernel_time`, µs.
    """
    times_ms: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # by node, operator and provider
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            operator, provider = (event["args"].get(key, "?") for key in ("op_name", "provider"))
            # A fused subgraph's name holds a digest: `OpenVINOExecutionProvider_OpenVINO-EP-subgraph_1_...`.
            operator = "OpenVINO, the whole graph" if operator.startswith("OpenVINO") else operator
            times_ms[event["name"], operator, provider].append(event["dur"] / 1000)
    totals: Counter[str] = Counter()
    operators: dict[str, Counter[str]] = defaultdict(Counter)
    for (_, operator, provider), durations in times_ms.items():
        totals[operator] += sum(durations[-runs:]) / runs  # type: ignore[assignment]
        operators[provider][operator] += 1
    return (
        {name: round(value, 4) for name, value in totals.most_common()},
        {provider: dict(counts.most_common()) for provider, counts in operators.items()},
    )
