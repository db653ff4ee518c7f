"""`clip-tools soak` on the real server."""

import subprocess
import sys
from pathlib import Path

import pytest

from clip_tools.measuring.results import read
from clip_tools.measuring.soak import figures
from clip_tools.measuring.soak_traffic import BAD_REQUESTS, REQUESTS

CLIP_TOOLS = str(Path(sys.executable).with_name("clip-tools"))


def soak(output: Path, *options: object) -> dict:
    """The result of a soak that found no problem."""
    command = [CLIP_TOOLS, "soak", "--output", str(output), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.with_suffix(".svg").read_text().startswith("<?xml")
    return read(output)


def test_some_seconds_of_everything(vit_server, tmp_path):
    """On a running server; the soak finds its process by the port."""
    result = soak(tmp_path / "soak.json", "--minutes", 0.15, "--clients", 3, "--url", vit_server.options.grpc_url)
    assert {row["kind"] for row in result["calls"]} == {*REQUESTS, *BAD_REQUESTS}
    assert all(point["private_mib"] > 100 and point["regions"] > 0 for point in result["points"])


@pytest.mark.long
def test_minutes_of_everything(repository, tmp_path, record_reliability):
    """Allocators fill for some minutes. The second half is judged: 14 MiB of 32 were seen, but 35 in three minutes."""
    result = soak(tmp_path / "soak.json", "--minutes", 12, "--models", repository)
    assert {rise["name"] for rise in result["rises"] if rise["rise"] is None} == set()
    record_reliability("soak", **figures(result))


def test_a_server_of_another_machine_is_refused(tmp_path):
    command = [CLIP_TOOLS, "soak", "--url", "grpc://localhost:1", "--output", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "port 1 of this machine" in done.stderr
