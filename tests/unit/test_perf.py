"""The input that perf_analyzer expects, and the figures that are read from its output."""

import base64
import csv
import json
import struct
from types import SimpleNamespace

import pytest

from clip_tools.errors import ToolError
from clip_tools.measuring.bench import _by_perf_analyzer
from clip_tools.measuring.cells import Cell
from clip_tools.measuring.options import BenchOptions, PerfOptions
from clip_tools.measuring.perf import (
    arguments,
    figures_of,
    perf,
    perf_input,
    plain_command,
    run_level,
)
from clip_tools.measuring.perf_analyzer import find_perf_analyzer
from clip_tools.measuring.report import keep
from clip_tools.paths import MODELS
from clip_tools.serving.probe import probe_image

# Two lines from a real run of perf_analyzer 2.51.0 with --verbose-csv. Most columns are left out.
CSV = """Concurrency,Inferences/Second,Client Send,Server Queue,Server Compute Infer,p50 latency,p99 latency,Avg latency
4,25.3399,12,1,98400,110104,298222,156031

Concurrency,request_id
"""


def test_each_image_is_one_entry_with_its_length_before_it():
    """The length is 4 bytes little-endian, as in a BYTES element of Triton. Without it perf_analyzer sends nothing."""
    data = json.loads(perf_input([b"abc", b"x" * 300], "clip_ensemble"))["data"]
    assert [entry["image_bytes"]["shape"] for entry in data] == [[1], [1]]
    raw = [base64.b64decode(entry["image_bytes"]["b64"]) for entry in data]
    assert raw == [b"\x03\0\0\0abc", struct.pack("<I", 300) + b"x" * 300]


def test_the_engine_alone_gets_the_pixels_of_preprocess():
    (entry,) = json.loads(perf_input([probe_image()], "clip_onnx"))["data"]
    assert entry["pixels"]["shape"] == [224, 224, 3]
    pixels = base64.b64decode(entry["pixels"]["b64"])
    assert len(pixels) == 224 * 224 * 3
    assert set(pixels) == {128}  # the probe is gray


def test_an_empty_list_of_images_is_refused():
    with pytest.raises(ToolError, match="at least one image"):
        perf_input([], "clip_ensemble")


def test_a_row_of_the_csv_gives_throughput_and_times_in_milliseconds():
    (row,) = csv.DictReader(CSV.splitlines()[:2])
    assert figures_of(row) == {
        "throughput": 25.3399,
        "latency_ms": {"p50": 110.104, "p99": 298.222, "mean": 156.031},
        "server_ms": {"queue": 0.001, "compute infer": 98.4},
    }


def test_a_level_that_settles_gets_the_first_row_of_the_csv(perf_analyzer, tmp_path):
    """perf_analyzer writes other tables below an empty line."""
    perf_analyzer(f'#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -f ]; do shift; done\ncat >"$2" <<END\n{CSV}END\n')
    level = run_level(PerfOptions(), "concurrency", 4, tmp_path / "input.json")
    assert level["settled"] and level["throughput"] == 25.3399 and level["level"] == 4


# Shortened output of perf_analyzer 2.51.0 with -v while the throughput rises. It then writes no CSV.
NOT_SETTLED = """#!/bin/sh
echo "  Pass [1] throughput: 548.2 infer/sec. Avg latency: 116000 usec (std 98332 usec). "
echo "  Pass [2] throughput: 645 infer/sec. Avg latency: 99000 usec (std 128888 usec). "
echo "  Pass [3] throughput: 1031.4 infer/sec. Avg latency: 62000 usec (std 134338 usec). "
echo "  Pass [4] throughput: 1153.6 infer/sec. Avg latency: 55000 usec (std 126566 usec). "
echo "Failed to obtain stable measurement within 4 measurement windows for concurrency 64." >&2
echo "Failed to obtain stable measurement." >&2
exit 2
"""


@pytest.fixture
def perf_analyzer(tmp_path, monkeypatch):
    """Replace perf_analyzer by a script."""

    def put(script: str) -> None:
        path = tmp_path / "perf_analyzer"
        path.write_text(script)
        path.chmod(0o755)
        monkeypatch.setattr("clip_tools.measuring.perf.find_perf_analyzer", lambda: (path, {}))

    return put


def test_a_level_that_does_not_settle_gives_the_throughput_of_each_window(perf_analyzer, tmp_path):
    perf_analyzer(NOT_SETTLED)
    result = perf(PerfOptions(concurrency=(64,)), tmp_path / "results")
    (level,) = result["levels"]
    assert not level["settled"]
    assert level["windows"] == (548.2, 645.0, 1031.4, 1153.6)
    assert level["throughput"] == pytest.approx((645 + 1031.4 + 1153.6) / 3)
    assert level["latency_ms"] == {"mean": pytest.approx(72)}
    expected = "concurrency 64 has not settled; images/s by window: 548.2, 645.0, 1031.4, 1153.6"
    words = keep(result, tmp_path / "results" / "perf.json")
    assert f"{expected}." in words and "| 943.3 | not settled |" in words
    assert (tmp_path / "results" / "perf.svg").is_file()


def test_a_window_without_a_finished_request_counts_as_zero(perf_analyzer, tmp_path):
    """perf_analyzer then exits with 3 instead of 2."""
    empty = "  Pass [4] cb::Error: No valid requests recorded within time interval. Please use a larger time window."
    perf_analyzer(NOT_SETTLED.replace("exit 2", f"echo '{empty}'\nexit 3").replace("Failed to obtain stable", "no"))
    level = run_level(PerfOptions(), "concurrency", 1, tmp_path / "input.json")
    assert level["windows"][-2:] == (1153.6, 0) and level["throughput"] == pytest.approx((1031.4 + 1153.6) / 3)


def test_bench_continues_with_the_mean_of_all_windows_when_a_level_does_not_settle(perf_analyzer):
    """So an hour of measurements of other arms is not lost. Unknown values are None."""
    perf_analyzer(NOT_SETTLED)
    service = SimpleNamespace(url="grpc://localhost:1")
    workload = SimpleNamespace(images=(probe_image(),))
    row = _by_perf_analyzer(service, Cell("perf-analyzer", concurrency=64), workload, BenchOptions())
    assert row["throughput"] == pytest.approx((548.2 + 645 + 1031.4 + 1153.6) / 4)
    assert row["p50_ms"] is None and row["not_settled"].startswith("concurrency 64 has not settled")


def test_a_failed_perf_analyzer_is_an_error_with_its_last_output(perf_analyzer, tmp_path):
    perf_analyzer("#!/bin/sh\necho 'error: failed to get model metadata'\nexit 99\n")
    with pytest.raises(ToolError, match=r"perf_analyzer failed \(99\): error: failed to get model metadata"):
        run_level(PerfOptions(), "concurrency", 1, tmp_path / "input.json")


def test_the_printed_command_has_no_absolute_paths(tmp_path):
    flags = arguments(
        PerfOptions(models=MODELS), "request-rate", 20, MODELS.parent / "results" / "in.json", tmp_path / "perf.csv"
    )
    command = plain_command(flags)
    assert "--request-rate-range 20" in command
    assert "--input-data results/in.json" in command
    assert str(MODELS.parent) not in command and str(tmp_path) not in command


def test_perf_analyzer_is_found_with_its_libraries():
    binary, environment = find_perf_analyzer()
    assert binary.name == "perf_analyzer"
    folder = environment["LD_LIBRARY_PATH"].split(":")[0]
    assert "perf-libraries" in folder
