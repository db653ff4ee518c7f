"""perf_analyzer's input as its documentation wants it, and its CSV as it writes it."""

import base64
import json
import struct

import pytest

from clip_tools.errors import ToolError
from clip_tools.measuring.perf import PerfOptions, arguments, level_of, perf_input, plain_command, read_csv
from clip_tools.measuring.perf_analyzer import find_perf_analyzer
from clip_tools.paths import MODELS
from clip_tools.serving.serve import probe_image

# Two lines of a real run of 2.51.0, --verbose-csv, most columns left out.
CSV = """Concurrency,Inferences/Second,Client Send,Server Queue,Server Compute Infer,p50 latency,p99 latency,Avg latency
4,25.3399,12,1,98400,110104,298222,156031

Concurrency,request_id
"""


def test_each_image_is_an_entry_of_its_own_with_its_length_before_it():
    """The length is 4 bytes little-endian, as Triton stores a BYTES element; without it perf_analyzer sends nothing."""
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


def test_no_images_are_refused():
    with pytest.raises(ToolError, match="at least one image"):
        perf_input([], "clip_ensemble")


def test_a_row_becomes_milliseconds(tmp_path):
    (tmp_path / "perf.csv").write_text(CSV)
    (row,) = read_csv(tmp_path / "perf.csv")
    level = level_of(row, "concurrency", 4, 1, "")
    assert level.throughput == 25.3399
    assert level.latency_ms == {"p50": 110.104, "p99": 298.222, "mean": 156.031}
    assert level.server_ms == {"queue": 0.001, "compute infer": 98.4}


def test_the_printed_command_names_no_machine(tmp_path):
    flags = arguments(
        PerfOptions(models=MODELS), "request-rate", 20, MODELS.parent / "results" / "in.json", tmp_path / "perf.csv"
    )
    command = plain_command(flags)
    assert "--request-rate-range 20" in command
    assert "--input-data results/in.json" in command
    assert str(MODELS.parent) not in command and str(tmp_path) not in command


def test_the_binary_finds_its_libraries():
    binary, environment = find_perf_analyzer()
    assert binary.name == "perf_analyzer"
    folder = environment["LD_LIBRARY_PATH"].split(":")[0]
    assert "perf-libraries" in folder
