"""Model Analyzer's configuration file and results, the sweep, and how a winner becomes a named configuration."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from clip_tools.errors import ToolError
from clip_tools.measuring import profile, sweep
from clip_tools.measuring.options import ProfileOptions
from clip_tools.measuring.variants import Variant, change, committed_variant
from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import deployment, read_config

# From a real run of Model Analyzer 1.58.
CSV = """\
Model,Batch,Concurrency,Model Config Path,Instance Group,Max Batch Size,Satisfies Constraints,Throughput (infer/sec),\
p99 Latency (ms)
clip_ensemble,1,8,"clip_ensemble_config_2: preprocess_config_1, clip_onnx_config_2","2:CPU,1:CPU","2,2",Yes,36.0,288.7
clip_ensemble,1,24,"clip_ensemble_config_4: preprocess_config_2, clip_onnx_config_4","3:CPU,2:CPU","4,8",Yes,37.2,841.8
clip_ensemble,1,4,"clip_ensemble_config_default: preprocess_config_default, clip_onnx_config_default","2:CPU,1:CPU",\
"64,64",Yes,20.6,250.3
"""
ENVIRONMENT = {"cpu": "Some CPU", "cores": 2, "date": "2026-11-20T06:00:00+00:00"}


@pytest.fixture
def models(tmp_path) -> Path:
    """A writable copy of the committed model repository."""
    folder = tmp_path / "models"
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns("*.onnx", "*.plan", "__pycache__"))
    return folder


def test_model_analyzer_accepts_the_committed_configuration_file(tmp_path):
    """Its own parser reads it, in a folder like a checkout after `clip-tools perf --write-input`."""
    (tmp_path / "results" / "model-analyzer").mkdir(parents=True)
    (tmp_path / "models").symlink_to(MODELS)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    code = (
        "import argparse, sys\n"
        "from model_analyzer.cli.cli import CLI\n"
        "from model_analyzer.config.input.config_command_profile import ConfigCommandProfile\n"
        "config = ConfigCommandProfile()\n"
        "parser = CLI(); parser.add_subcommand(cmd='profile', help='', config=config)\n"
        f"parser.parse(['profile', '-f', {str(ProfileOptions().config)!r}])\n"
        "print([model.model_name() for model in config.ensemble_composing_models], config.triton_launch_mode)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['preprocess', 'clip_onnx'] local"


def test_the_committed_configuration_file_has_no_absolute_paths():
    text = ProfileOptions().config.read_text()
    assert str(ROOT) not in text and "/home" not in text
    options = ProfileOptions(http_port=18000, mode="remote", host="gpu-host", folder=ROOT / "results")
    config = profile.analyzer_config(options)
    assert (config["triton_launch_mode"], config["triton_http_endpoint"]) == ("remote", "gpu-host:18000")


def test_points_are_sorted_best_first_and_describe_their_setting():
    points = profile.read_points(CSV)
    assert [point["throughput"] for point in points] == [37.2, 36.0, 20.6]
    assert points[0]["setting"] == "preprocess 3 instances, batch limit 4; clip_onnx 2 instances, batch limit 8"
    assert points[2]["setting"].startswith(
        "as committed: preprocess 2 instances, batch limit 64; clip_onnx 1 instance,"
    )


def test_the_winner_becomes_a_configuration_of_the_models_it_changes(models):
    best = profile.read_points(CSV)[0]["setting"]
    written = sweep.apply({"kind": "profile", "environment": ENVIRONMENT, "best": best}, "tuned", models)
    assert sorted(path.parent.parent.name for path in written) == ["clip_onnx", "preprocess"]
    parts = {model.name: model.config for model in deployment(models, "tuned")}
    assert (parts["preprocess"].instance_group[0].count, parts["clip_onnx"].instance_group[0].count) == (3, 2)
    assert [list(parts[name].dynamic_batching.preferred_batch_size) for name in ("preprocess", "clip_onnx")] == [
        [4],
        [8],
    ]
    # Clients may send as many images at once as before.
    assert {part.max_batch_size for part in parts.values()} == {read_config(MODELS, "clip_ensemble").max_batch_size}
    # Everything else is as committed: the engine, the limits on images and the queues.
    for name in ("preprocess", "clip_onnx"):
        queue = read_config(MODELS, name).dynamic_batching.default_queue_policy
        assert parts[name].dynamic_batching.default_queue_policy == queue
    assert parts["clip_onnx"].optimization == read_config(MODELS, "clip_onnx").optimization
    assert parts["preprocess"].parameters == read_config(MODELS, "preprocess").parameters
    assert "Some CPU, 2 cores, 2026-11-20" in written[0].read_text()


def test_when_the_committed_configuration_wins_nothing_is_written(models):
    best = profile.read_points(CSV)[2]["setting"]
    assert sweep.apply({"kind": "profile", "environment": ENVIRONMENT, "best": best}, "tuned", models) == []


@pytest.mark.parametrize("name", ["", "../evil", "Tuned", "a b"])
def test_a_configuration_name_that_is_no_plain_file_name_is_refused(models, name):
    with pytest.raises(ToolError, match="expected lower-case letters"):
        sweep.apply({"kind": "profile", "best": ""}, name, models)


def hill(variant: Variant) -> sweep.Point:
    """A fake measurement: more instances are better up to 3, a batch limit of 16 is best, and a delay costs."""
    gain = min(variant.preprocess_instances, 3) * 10 - abs(variant.max_batch - 16) / 8 - variant.queue_delay_us / 100
    return sweep.Point(variant, 20 + gain, 100.0)


START = Variant(preprocess_instances=2, engine_instances=1, engine_threads=0, max_batch=64, queue_delay_us=0)
AXES = {
    "preprocess_instances": tuple({"preprocess_instances": count} for count in (1, 2, 3, 4)),
    "max_batch": tuple({"max_batch": limit} for limit in (8, 16, 64)),
    "queue_delay_us": tuple({"queue_delay_us": delay} for delay in (0, 1000)),
}


@pytest.mark.parametrize("cores", [1, 2, 6, 64])
def test_the_sweeps_engines_share_the_cores_and_are_few(cores):
    """Each instance has its own copy of the weights."""
    tried = [replace(START, **engine) for engine in sweep._engines(cores)]
    assert START in tried
    assert len(set(tried)) == len(tried)
    assert all(one.engine_instances <= 4 for one in tried)
    assert all(one.engine_instances * one.engine_threads <= max(cores, 2) for one in tried)


def test_every_axis_changes_settings_of_a_variant():
    for axis in sweep.axes_of(["preprocess_instances", "engine", "max_batch", "queue_delay_us"]).values():
        assert all(replace(START, **value) for value in axis)


def test_the_sweep_climbs_axis_by_axis_and_measures_nothing_twice():
    seen = []

    def measure(variant):
        seen.append(variant)
        return hill(variant)

    best, points = sweep.search(START, AXES, measure)
    assert (best.preprocess_instances, best.max_batch, best.queue_delay_us) == (3, 16, 0)
    assert len(seen) == len(set(seen)) == len(points) < len(list(itertools.product(*AXES.values())))


def test_a_difference_within_noise_changes_nothing():
    throughputs = itertools.cycle([30.0, 30.3, 29.8])
    best, _ = sweep.search(START, AXES, lambda variant: sweep.Point(variant, next(throughputs), 1.0))
    assert best == START


def test_an_interrupted_sweep_resumes_from_its_log(tmp_path):
    """Only points of the same machine and load count. A truncated line is ignored."""
    log, same = tmp_path / "sweep.jsonl", {"cpu": "Some CPU", "cores": 2}
    mine, other = hill(START), hill(replace(START, max_batch=8))
    rows = [{**same, **asdict(mine)}, {**same, "cores": 4, **asdict(other)}]
    log.write_text("\n".join(map(json.dumps, rows)) + '\n{"cpu": "Some C')
    assert sweep.read_log(log, same) == {START: mine}
    assert sweep.read_log(tmp_path / "none.jsonl", same) == {}


def test_model_analyzers_winner_can_be_measured_by_the_sweep():
    variant = sweep.variant_of(profile.read_points(CSV)[0]["setting"], START)
    assert (variant.preprocess_instances, variant.engine_instances, variant.max_batch) == (3, 2, 4)
    assert sweep.variant_of("something else", START) is None


def test_the_sweeps_winner_becomes_a_configuration_too(models):
    best = replace(START, preprocess_instances=3, queue_delay_us=500)
    result = {"kind": "sweep", "environment": ENVIRONMENT, "best": sweep.describe(best), "best_variant": asdict(best)}
    written = sweep.apply(result, "swept", models)
    assert [path.parent.parent.name for path in written] == ["preprocess", "clip_onnx"]
    assert read_config(models, "preprocess", "swept").instance_group[0].count == 3
    assert read_config(models, "clip_onnx", "swept").dynamic_batching.max_queue_delay_microseconds == 500


def test_the_sweep_starts_from_the_committed_configuration(models):
    """So "as committed" in its table stays true when the committed configuration changes."""
    start = committed_variant(models)
    assert not any(change(read_config(models, name), start) for name in ("preprocess", "clip_onnx", "clip_ensemble"))
    result = {"kind": "sweep", "environment": ENVIRONMENT, "best": sweep.describe(start), "best_variant": asdict(start)}
    assert sweep.apply(result, "swept", models) == []


def test_checkpoints_of_another_commit_are_deleted(tmp_path):
    """A run of the same commit keeps them, so that it can resume after an interruption."""
    checkpoint = tmp_path / "checkpoints" / "0.ckpt"
    for commit, kept in (("a", False), ("a", True), ("b", False)):
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text("{}")
        profile.begin_anew_unless_same(tmp_path, {"git_commit": commit})
        assert checkpoint.is_file() == kept
