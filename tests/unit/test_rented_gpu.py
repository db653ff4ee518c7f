"""`deploy/rented-gpu.sh`: the commands that it runs, without a GPU or Docker."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from clip_tools.paths import ROOT

SCRIPT = ROOT / "deploy" / "rented-gpu.sh"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of fake programs, which print their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in {
        "nvidia-smi": "",
        "make": 'echo "make $@"',
        "docker": """
if [ "$1" = inspect ]; then echo "$3" | sed 's/.*Status.*/healthy/; s/.*Running.*/true/'; else echo "docker $@"; fi""",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


def run(way: str, programs: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "CLIP_KEYS": str(tmp_path / "keys"), "CLIP_HOST": "127.0.0.1", "PYTHON": "sh"}
    return subprocess.run([SCRIPT, way], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_environment_serves_with_tls_and_a_key_that_a_second_run_reuses(programs, tmp_path):
    first = run("environment", programs, tmp_path)
    assert first.returncode == 0, first.stderr
    keys = tmp_path / "keys"
    wanted = f"--host 0.0.0.0 --tls-cert {keys}/cert.pem --tls-key {keys}/key.pem"
    assert first.stdout.splitlines() == ["make setup-gpu PYTHON=sh", f"make serve ARGS={wanted} "]
    assert (keys / "api-key").stat().st_mode & 0o077 == (keys / "key.pem").stat().st_mode & 0o077 == 0
    made = {path.name: path.read_bytes() for path in keys.iterdir()}
    run("environment", programs, tmp_path)
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == made


def test_docker_run_gets_the_documented_flags_and_publishes_only_to_localhost(programs, tmp_path):
    done = run("docker", programs, tmp_path)
    assert done.returncode == 0, done.stderr
    (given,) = re.findall(r"^docker run (.*)$", done.stdout, re.MULTILINE)
    page = (ROOT / "docs" / "rented-gpu.md").read_text()
    (said,) = re.findall(r"docker run (.*?clip-embed:local)$", page.replace("\\\n", ""), re.MULTILINE)
    assert set(said.split()) <= set(given.split())
    assert all(port.startswith("127.0.0.1:") for port in re.findall(r"--publish (\S+)", given))


def test_without_an_nvidia_driver_it_exits_1_with_the_reason(programs, tmp_path):
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = run("environment", programs, tmp_path)
    assert done.returncode == 1
    assert "expected an NVIDIA driver" in done.stderr
