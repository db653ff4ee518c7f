"""`clip-tools bench`: time windows, rounds, the throughput bound and the targets."""

import pytest

from clip_tools.errors import ToolError
from clip_tools.in_process import instance_kind, open_engine
from clip_tools.measuring import bench as bench_module
from clip_tools.measuring import results
from clip_tools.measuring.arms import Arm
from clip_tools.measuring.bench import (
    ARMS,
    bare_part,
    complete,
    default_arms,
    in_rounds,
    left_out,
    plan,
    quick,
    target_configs,
)
from clip_tools.measuring.cells import Cell
from clip_tools.measuring.load import run_closed_loop, summarise
from clip_tools.measuring.options import BenchOptions
from clip_tools.measuring.services import remote_triton
from clip_tools.measuring.targets import TARGETS, check, throughput_bound, verdicts_text
from clip_tools.measuring.watch import gpu_figures, read_gpu
from clip_tools.paths import MODELS
from clip_tools.repository import read_config


def result_with(*cells: tuple[str, int, list[float]], **more) -> dict:
    """A bench result with throughputs: (arm, concurrency, one figure a round)."""
    rows = [
        {"arm": arm, "images": "640x480", "batch": 1, "concurrency": concurrency, "round": number, "throughput": value}
        for arm, concurrency, figures in cells
        for number, value in enumerate(figures)
    ]
    return {"cells": rows, "bare": [], **more}


def verdict_of(key: str, result: dict):
    return next(verdict for verdict in check(result) if verdict.target.key == key)


def test_the_bound_is_the_cores_over_the_core_seconds_of_an_image():
    """5 ms of one core and 20 ms of both are 45 core-ms an image: two cores give 44.4 images a second."""
    assert throughput_bound(0.005, 0.020, 2) == pytest.approx(2 / 0.045)
    assert throughput_bound(0.0, 0.020, 2) == pytest.approx(50)  # the engine alone
    assert throughput_bound(0.010, 0.0, 4) == pytest.approx(400)  # four threads that decode


def test_on_a_gpu_the_slower_step_is_the_bound():
    """A GPU engine takes no core. Sixteen cores decode at most 1,600 images a second, however fast the engine is."""
    assert throughput_bound(0.010, 0.0001, 16, on_gpu=True) == pytest.approx(1600)
    assert throughput_bound(0.010, 0.001, 16, on_gpu=True) == pytest.approx(1000)
    bare = [{"cores": 16, "preprocess_s": 0.010, "engine_s": {"8": 0.001}, "on_gpu": True, "single_ms": [9.0]}]
    verdict = verdict_of("bound", result_with(("ensemble-grpc", 16, [950]), bare=bare))
    assert verdict.ratio.median == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("kind", "gpu", "expected"), [(0, None, "CPU"), (0, "L4", "GPU"), (2, "L4", "CPU"), (1, None, "GPU")]
)
def test_the_engine_alone_runs_where_triton_would_run_it(kind, gpu, expected, monkeypatch):
    monkeypatch.setattr("clip_tools.in_process.find_gpu", lambda: gpu)
    config = read_config(MODELS, "clip_onnx")
    config.instance_group[0].kind = kind  # KIND_AUTO, KIND_CPU, KIND_GPU
    assert instance_kind(config) == expected


def test_open_engine_refuses_a_missing_provider_and_a_configuration_without_onnxruntime(monkeypatch):
    monkeypatch.setattr("clip_tools.in_process.find_gpu", lambda: None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ToolError, match=r"OpenVINOExecutionProvider is asked for.*make setup-cpu"):
        open_engine(MODELS, "cpu-bf16")
    with pytest.raises(ToolError, match="'trt' has no onnxruntime model"):
        open_engine(MODELS, "trt")


def test_requests_count_by_the_part_that_lies_in_the_window():
    """Requests of four images, 2 s each, one after the other from 0 s: 2 images/s, wherever the window lies."""
    requests = [(2.0 * i, 2.0 * i + 2, 4) for i in range(10)]
    for opened, closed in ((4, 8), (5, 9), (4.7, 12.1)):
        assert summarise(requests, opened, closed, 1).throughput == pytest.approx(2)
    assert summarise(requests, 5, 9, 1).requests == 2  # latencies come only from requests that ended in the window
    assert summarise(requests, 5, 9, 1).p50_ms == pytest.approx(2000)


def test_every_answer_is_checked_and_a_wrong_one_stops_the_run():
    import numpy as np

    def check_rows(indices, answer):
        if answer[0, 0] != indices[0]:
            raise ToolError("wrong")
        return 1.0

    def right(indices):
        return np.array([[float(i)] for i in indices])

    options = {"batch": 2, "concurrency": 3, "seconds": 0.02, "warmup_s": 0.0}
    assert run_closed_loop(right, check_rows, 5, **options).agreement == 1
    with pytest.raises(ToolError, match="wrong"):
        run_closed_loop(lambda indices: right(indices) + (indices[0] == 4), check_rows, 5, **options)


def test_a_request_that_fails_stops_the_run():
    def refuse(indices):
        raise ConnectionError("gone")

    with pytest.raises(ToolError, match="ConnectionError: gone"):
        run_closed_loop(refuse, lambda *_: 1.0, 3, batch=1, concurrency=2, seconds=5, warmup_s=0)


@pytest.mark.parametrize(
    "name", ["ensemble-grpc", "ensemble-grpc@cpu-bf16", "preprocess:2", "preprocess@fast:3", "pytorch@fp16"]
)
def test_an_arm_is_parsed_from_its_name(name):
    assert Arm.parse(name).name == name


@pytest.mark.parametrize("name", ["ensemble", "pytorch@cpu-bf16", "preprocess:", "", "ensemble-grpc@"])
def test_an_invalid_arm_name_is_refused(name):
    with pytest.raises(ToolError, match="is no arm"):
        Arm.parse(name)


def test_cells_of_one_shape_are_adjacent_and_every_other_round_reverses_them():
    options = BenchOptions(arms=("ensemble-grpc", "pytorch"), batches=(1, 8), concurrency=(1, 4), for_targets=False)
    cells = plan(options, [])
    assert len(cells) == len(set(cells)) == 6
    order = [cell for _, cell in in_rounds(cells, 2)]
    first, second = order[:6], order[6:]
    assert set(first) == set(second) == set(cells)
    assert [cell.arm for cell in first] == ["ensemble-grpc", "pytorch"] * 3
    assert [cell.arm for cell in second] == ["pytorch", "ensemble-grpc"] * 3


def test_the_targets_bring_their_own_cells_unless_their_configuration_is_missing():
    planned = {cell.arm for cell in plan(BenchOptions(), ["cpu-bf16"])}
    assert {"ensemble-grpc@cpu-bf16", "perf-analyzer", "preprocess"} <= planned
    assert "preprocess@fast" not in planned
    assert "perf-analyzer" not in {cell.arm for cell in plan(quick(BenchOptions()), ["cpu-bf16"])}


def test_a_configuration_whose_provider_is_not_installed_is_left_out(monkeypatch):
    """A GPU host has no OpenVINO, so the targets there skip `cpu-bf16`."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert target_configs(MODELS) == ["fast"]


def test_the_default_arms_include_fp16_with_a_gpu_and_an_fp16_graph(tmp_path):
    folder = tmp_path / "clip_onnx" / "1"
    folder.mkdir(parents=True)
    assert default_arms(tmp_path, has_gpu=True, is_remote=False) == ARMS
    (folder / "model.fp16.onnx").touch()
    expected = (*ARMS, "ensemble-grpc@ort-fp16", "pytorch@fp16")
    assert default_arms(tmp_path, has_gpu=True, is_remote=False) == expected
    assert default_arms(tmp_path, has_gpu=False, is_remote=False) == ARMS


def test_left_out_fp16_arms_are_reported_with_the_export_command(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_tools.measuring.bench.find_gpu", lambda: "L4")
    assert "clip-tools export-onnx --precision fp16" in left_out(BenchOptions(models=tmp_path))
    assert left_out(BenchOptions(arms=("pytorch",), models=tmp_path)) == ""
    monkeypatch.setattr("clip_tools.measuring.bench.find_gpu", lambda: None)
    assert left_out(BenchOptions(models=tmp_path)) == ""


def test_with_remote_servers_no_server_is_started_for_the_targets():
    options = complete(BenchOptions(url="grpc://far:8001", pytorch_url="http://far:8010"))
    assert options.arms == ("ensemble-grpc", "pytorch")
    assert not options.for_targets and options.cold_starts == 0


@pytest.mark.parametrize("arm", ["json-http", "ensemble-grpc@fast", "perf-analyzer:2"])
def test_an_arm_that_needs_its_own_server_cannot_be_measured_remotely(arm):
    with pytest.raises(ToolError, match=f"{arm} needs a server that is started for it"):
        complete(BenchOptions(arms=(arm,), url="grpc://far:8001"))


def test_the_memory_of_a_remote_server_cannot_be_watched():
    with pytest.raises(ToolError, match="--soak watches a server of this machine"):
        complete(BenchOptions(url="grpc://far:8001", soak_requests=1000))


@pytest.mark.parametrize("url", ["far:8001", "http://far:8000", "grpc://", "grpc://far:8001/v2"])
def test_a_url_that_is_not_a_grpc_servers_is_refused(url):
    with pytest.raises(ToolError, match="expected grpc://HOST:PORT"):
        remote_triton(url)


def test_a_ratio_across_devices_misses_its_target_and_says_why():
    """A GPU against a CPU would meet the target whatever the software does."""
    met = result_with(("ensemble-grpc", 16, [40, 35, 30]), ("pytorch", 16, [10, 10, 10]))
    assert verdict_of("pytorch", met | {"devices": {"ensemble-grpc": "GPU", "pytorch": "GPU"}}).is_met
    across = verdict_of("pytorch", met | {"devices": {"ensemble-grpc": "GPU", "pytorch": "CPU"}})
    assert not across.is_met
    assert "3.50 (3.00 to 4.00, 3 rounds); GPU against CPU: not one device | missed |" in verdicts_text([across])


def test_every_target_lists_all_cells_that_it_reads():
    """A result with the targets' cells, the bare steps and the memory leaves no target unmeasured."""
    cells = {cell for target in TARGETS for cell in target.cells}
    rows = [{**vars(cell), "round": 0, "throughput": 10.0, "p50_ms": 30.0} for cell in sorted(cells, key=str)]
    if not any(cell.arm.endswith(":2") for cell in cells):  # a single core
        rows += [{**row, "arm": row["arm"].replace(":1", ":2")} for row in rows if ":1" in row["arm"]]
    bare = [{"round": 0, "cores": 2, "preprocess_s": 0.005, "engine_s": {"1": 0.03, "16": 0.02}, "single_ms": [30.0]}]
    soak = [{"requests": 1000, "memory_mib": 900.0}, {"requests": 20000, "memory_mib": 910.0}]
    verdicts = check({"cells": rows, "bare": bare, "soak": soak})
    assert all(verdict.ratio for verdict in verdicts), [verdict.reason for verdict in verdicts]


def test_a_target_is_met_by_the_median_of_its_rounds():
    met = result_with(("ensemble-grpc", 16, [40, 35, 30]), ("pytorch", 16, [10, 10, 10]))
    missed = result_with(("ensemble-grpc", 16, [40, 32, 30]), ("pytorch", 16, [10, 10, 10]))
    assert verdict_of("pytorch", met).is_met
    assert not verdict_of("pytorch", missed).is_met
    assert verdict_of("pytorch", missed).ratio.median == pytest.approx(3.2)


def test_a_target_against_regression_is_missed_only_beyond_noise():
    noise = result_with(("preprocess:1", 16, [100, 100, 100]), ("preprocess:2", 16, [99, 98, 101]))
    worse = result_with(("preprocess:1", 16, [100, 100, 100]), ("preprocess:2", 16, [90, 91, 89]))
    assert verdict_of("instances", noise).is_met
    assert not verdict_of("instances", worse).is_met


def test_the_instances_target_is_judged_by_its_worst_step():
    result = result_with(
        ("preprocess:1", 16, [100]),
        ("preprocess:2", 16, [190]),
        ("preprocess:3", 16, [120]),
        ("preprocess:10", 16, [300]),
    )
    assert verdict_of("instances", result).ratio.median == pytest.approx(120 / 190)


def test_a_target_without_its_measurement_is_missed_and_says_which():
    verdict = verdict_of("pytorch", result_with(("pytorch", 16, [10])))
    assert not verdict.is_met
    assert "ensemble-grpc with 640x480 at batch 1, concurrency 16" in verdict.reason
    assert not verdict_of("memory", result_with()).is_met


def test_a_target_is_missed_when_a_measurement_has_not_settled():
    result = result_with(("ensemble-grpc", 16, [40]), ("perf-analyzer", 16, [40]))
    assert verdict_of("client", result).is_met
    result["cells"][-1]["not_settled"] = "concurrency 16 has not settled"
    verdict = verdict_of("client", result)
    assert not verdict.is_met and "perf-analyzer, concurrency 16 has not settled" in verdict.reason


def test_memory_may_grow_by_5_percent():
    grown = [{"requests": 1000, "memory_mib": 1000.0}, {"requests": 20000, "memory_mib": 1049.0}]
    assert verdict_of("memory", result_with(soak=grown)).is_met
    grown[1]["memory_mib"] = 1051.0
    assert not verdict_of("memory", result_with(soak=grown)).is_met


def test_nvidia_smi_output_is_parsed_and_none_when_empty():
    assert read_gpu("37 %, 2048 MiB\n90 %, 1 MiB") == (37.0, 2048.0)
    assert read_gpu("") is None
    samples = [(0.0, 10.0), (40.0, 50.0), (60.0, 30.0)]  # the first is from before the load
    assert gpu_figures(samples) == {"utilisation_percent": 50.0, "memory_mib": 50.0}


def test_a_cell_with_defaults_equals_one_written_out():
    assert Cell("pytorch", "640x480", 1, 16) == Cell("pytorch", concurrency=16)


def test_bare_steps_are_measured_next_to_the_cells_they_are_compared_with():
    """In each round the bare single image comes right before concurrency 1, the bare steps right before 16."""
    options = BenchOptions(arms=("ensemble-grpc", "pytorch"), batches=(1, 8), concurrency=(1, 4, 16))
    bare, order = [], []
    for number, cell in in_rounds(plan(options, []), 2):
        part = bare_part(cell, number, bare, options)
        if part:
            bare[-1] |= {"single_ms": []} if part == "single" else {"engine_s": {}}
            order.append((number, part, cell.batch, cell.concurrency))
    expected = [("single", 1, 1), ("steps", 1, 16)]
    assert order == [(number, *parts) for number in (0, 1) for parts in expected]


def test_an_earlier_result_is_renamed_after_its_date_and_nothing_is_overwritten(tmp_path):
    output = tmp_path / "bench.json"
    assert results.keep_earlier(output) is None
    for kept in ("bench-20261129T120408.json", "bench-20261129T120408-2.json"):
        results.write({"kind": "bench", "environment": {"date": "2026-11-29T12:04:08+00:00"}}, output)
        assert results.keep_earlier(output) == tmp_path / kept
    output.write_text("my notes")
    with pytest.raises(ToolError, match="expected a result"):
        results.keep_earlier(output)
    assert output.read_text() == "my notes"


def test_every_server_of_the_arms_is_started_cold_once_a_round(monkeypatch):
    """Arms that share a server start it once; another configuration needs another server."""
    started = []

    class Started:
        start_s = 1.0

    class Alone:
        def __init__(self, arms, *_):
            started.append(arms[0].name)
            self.services = {arms[0].server: Started()}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench_module, "deployed", Alone)
    for arms, servers in (
        (ARMS, ["ensemble-grpc", "pytorch"]),
        (("pytorch", "ensemble-grpc", "ensemble-grpc@ort-fp16", "ensemble-grpc@trt"), None),
    ):
        started.clear()
        options = BenchOptions(arms=arms, cold_starts=2)
        rows = list(bench_module._cold_starts(options, None, lambda *_: None))
        assert started == list(servers or arms) * 2
        assert {row["round"] for row in rows} == {0, 1}
