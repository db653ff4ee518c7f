"""Documents are generated from results alone, and `compare` shows how two results differ."""

import copy
import json
import re

import pytest

from clip_tools.docs import generated
from clip_tools.errors import ToolError
from clip_tools.measuring.compare import compare, text
from clip_tools.measuring.onnx_profile import summarise
from clip_tools.measuring.report import COMMITTED, DOCUMENT, committed_documents, document, readme
from clip_tools.measuring.results import read, write
from clip_tools.measuring.sections import onnx_section

ENVIRONMENT = {
    "cpu": "Some CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "gpu": None,
    "packages": {"torch": "2.15.0"},
    "git_commit": "0123456789ab",
    "python": "3.11.7",
    "date": "2026-11-20T06:00:00+00:00",
    "command": "clip-tools bench",
}


def bench_result(*, speed: float = 1.0, rounds: int = 4) -> dict:
    rows = [
        {
            "arm": arm,
            "images": "640x480",
            "batch": batch,
            "concurrency": concurrency,
            "round": number,
            "throughput": base * factor * (1 + number / 100),
            "p50_ms": 1000 / base,
            "p95_ms": 1100 / base,
            "p99_ms": 1200 / base,
            "server_cores_busy": 1.5,
        }
        for arm, base, factor in (("ensemble-grpc", 30.0, speed), ("pytorch", 8.0, 1.0))
        for batch, concurrency in ((1, 1), (8, 1), (1, 16))
        for number in range(rounds)
    ]
    bare = [
        {"round": n, "cores": 2, "preprocess_s": 0.005, "engine_s": {"8": 0.021}, "single_ms": [30.0]}
        for n in range(rounds)
    ]
    return {
        "kind": "bench",
        "environment": ENVIRONMENT,
        "weights": {"model": "ViT-B-32", "trained": True},
        "options": {"images": "640x480", "rounds": rounds, "seconds": 4.0},
        "images": {"640x480": {"count": 32, "mean_size_bytes": 60000}},
        "cold_start": [{"arm": "pytorch", "round": 0, "start_s": 9.5}],
        "cells": rows,
        "bare": bare,
    }


def test_the_same_results_give_the_same_documents_to_the_letter():
    """Pictures too: they have no date, version or random id."""
    first = document({"one": bench_result()}, pictures_at="benchmarks")
    assert first == document({"one": copy.deepcopy(bench_result())}, pictures_at="benchmarks")
    words, pictures = first
    assert "Some CPU, 2 cores, 8 GiB, no GPU; 2026-11-20, commit 0123456789ab" in words
    assert "    clip-tools bench\n" in words
    assert set(pictures) == {"one-batch.svg", "one-concurrency.svg"}
    assert all(f"benchmarks/{name}" in words for name in pictures)


def test_the_ratio_in_the_table_is_paired_by_round():
    words, _ = document({"one": bench_result(speed=1.2)}, pictures_at=".")
    assert "| ensemble-grpc | 640x480 | 16 at once | 36.5 |" in words
    assert "4.50 (4.50 to 4.50, 4 rounds)" in words
    assert "2 cores / (5.00 + 2 x 21.00) ms = 42.6 images/s" in words
    assert "Served at 36.5 images/s, the server's processes had 1.50 of the 2 cores" in words
    assert "some 41 ms an image" in words


def test_devices_and_the_gpu_are_in_the_table():
    result = bench_result()
    result["devices"] = {"ensemble-grpc": "GPU", "pytorch": "CPU"}
    for row in result["cells"]:
        if row["arm"] == "ensemble-grpc":
            row["gpu"] = {"utilisation_percent": 37.0 + row["round"], "memory_mib": 2048.0 + row["round"]}
    words, _ = document({"one": result}, pictures_at=".")
    assert "| against pytorch | device | GPU % | GPU MiB |" in words
    assert "| 3.75 (3.75 to 3.75, 4 rounds), GPU against CPU | GPU | 38 | 2,051 |" in words
    assert "|  | CPU |  |  |" in words


def test_an_arm_that_did_not_settle_is_in_the_table_without_latencies():
    result = bench_result()
    line = "concurrency 1 has not settled; images/s by window: 6.0, 0.0, 4.0"
    for row in [row for row in result["cells"] if row["arm"] == "pytorch"]:
        row |= {"arm": "perf-analyzer", "p50_ms": None, "p95_ms": None, "p99_ms": None, "not_settled": line}
    words, _ = document({"one": result}, pictures_at=".")
    assert f"perf-analyzer, {line}." in words and "| perf-analyzer | 640x480 | batch 1 | 8.1 |" in words
    (latencies,) = re.findall(r"one image, ms.*?\n\n", words, re.DOTALL)
    assert "ensemble-grpc" in latencies and "perf-analyzer" not in latencies
    assert "perf-analyzer, 640x480, batch 1, 1 at once, images/s" in compare(result, result).changes


def test_pytorch_in_fp16_gets_its_own_ratio_column():
    result = bench_result()
    rows = [{**row, "arm": f"{row['arm']}@fp16", "throughput": 2 * row["throughput"]} for row in result["cells"]]
    result["cells"] += [row for row in rows if row["arm"] == "pytorch@fp16"]
    words, _ = document({"one": result}, pictures_at=".")
    assert "| against pytorch | against pytorch@fp16 |" in words
    assert "| 3.75 (3.75 to 3.75, 4 rounds) | 1.88 (1.88 to 1.88, 4 rounds) |" in words
    assert "| 2.00 (2.00 to 2.00, 4 rounds) |  |" in words


def test_nodes_on_another_provider_are_listed_with_their_operators():
    """ONNX Runtime computes shapes on the CPU. An operator without a GPU kernel would run there too."""
    names = [("MatMul", "CUDAExecutionProvider", 2), ("Gather", "CPUExecutionProvider", 1)]
    events = [
        {"cat": "Node", "name": f"{op}_{i}_kernel_time", "dur": 10, "args": {"op_name": op, "provider": provider}}
        for op, provider, count in names
        for i in range(count)
    ]
    _, operators = summarise(events, 1)
    assert operators == {"CUDAExecutionProvider": {"MatMul": 2}, "CPUExecutionProvider": {"Gather": 1}}
    profile = {"provider": "CUDAExecutionProvider", "batch": 8, "run_ms": 1.0, "created_s": 1.0, "fused": False}
    profile |= {"by_operator_ms": {"MatMul": 1.0}, "operators_by_provider": operators}
    profile |= {"nodes_by_provider": {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}}
    session = {"created_s": 1.0, "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    scaling = [{"batch": 1, "median_ms": 1.0, "throughput": 1000.0}]
    result = {"config_name": None, "session": session, "scaling": scaling, "operators": [profile]}
    words = onnx_section("one", result).text
    assert "2 by CUDAExecutionProvider, 1 by CPUExecutionProvider; CPUExecutionProvider's are 1 Gather." in words


def test_the_committed_documents_are_those_of_the_committed_results():
    """`make lint` checks this too. Without results nothing is generated."""
    made = committed_documents()
    assert bool(made) == any(COMMITTED.glob("*.json"))
    assert made.items() <= generated().items()
    assert all(path.read_text() == content for path, content in made.items())


def test_a_new_result_makes_the_document_stale(tmp_path):
    results, target = tmp_path / "results", tmp_path / "benchmarks.md"
    results.mkdir()
    assert committed_documents(results, target) == {}
    write(bench_result(), results / "laptop.json")
    made = committed_documents(results, target)
    assert set(made) == {target, *(tmp_path / "benchmarks" / f"laptop-{k}.svg" for k in ("batch", "concurrency"))}
    write(bench_result(speed=2), results / "laptop.json")
    assert committed_documents(results, target)[target] != made[target]


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = json.loads(json.dumps(bench_result()))
    write(result, tmp_path / "bench.json")
    assert read(tmp_path / "bench.json") == result
    assert len((tmp_path / "bench.json").read_text().splitlines()) > len(result["cells"])  # one row per line


def test_the_readmes_figure_is_that_of_the_committed_results(tmp_path):
    text = "# Title\n<!-- figure -->\nold\n<!-- /figure -->\nthe rest\n"
    assert readme(text, tmp_path) == text  # nothing measured, nothing changed
    write(bench_result(), tmp_path / "laptop.json")
    assert readme("no markers", tmp_path) == "no markers"
    written = readme(text, tmp_path)
    assert "| `ensemble-grpc` | 30.5 | 3.75 |" in written
    assert "Some CPU, 2 cores, no GPU, 2026-11-20, `clip-tools bench`" in written
    assert "old" not in written and written.endswith("<!-- /figure -->\nthe rest\n")
    assert readme(written, tmp_path) == written


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"kind": "bench"}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(ToolError, match="expected a result"):
        read(tmp_path / "bench.json")


def test_an_unknown_kind_of_result_is_refused():
    with pytest.raises(ToolError, match="expected a result of kind"):
        document({"one": {"kind": "poem"}}, pictures_at=".")


def test_compare_distinguishes_a_change_from_noise():
    comparison = compare(bench_result(), bench_result(speed=1.3))
    changed = comparison.changes["ensemble-grpc, 640x480, batch 1, 16 at once, images/s"]
    assert (changed.verdict, round(changed.ratio, 2)) == ("faster", 1.3)
    assert comparison.changes["pytorch, 640x480, batch 1, 16 at once, images/s"].verdict == "the same within noise"
    assert comparison.same_machine and comparison.differences == []


def test_compare_shows_that_an_arm_ran_on_another_device():
    before, after = bench_result() | {"devices": {"pytorch": "CPU"}}, bench_result() | {"devices": {"pytorch": "GPU"}}
    comparison = compare(before, after)
    assert "device of pytorch: CPU -> GPU" in comparison.differences and not comparison.same_machine


def test_compare_shows_differences_between_the_environments():
    other = bench_result()
    other["environment"] = {**ENVIRONMENT, "cpu": "Another CPU", "packages": {"torch": "2.16.0"}}
    comparison = compare(bench_result(), other)
    assert not comparison.same_machine
    assert "package torch: 2.15.0 -> 2.16.0" in text(comparison)
    assert "only the ratios within each result can be compared" in text(comparison)


def test_the_document_is_where_the_readme_links_it():
    assert DOCUMENT.name == "benchmarks.md" and DOCUMENT.parent.name == "docs"
