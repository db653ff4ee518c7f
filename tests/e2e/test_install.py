"""The client installs without the rest of the project, with few dependencies."""

import subprocess
import sys
from pathlib import Path

import pytest

from clip_tools.paths import ROOT

UV = Path(sys.executable).with_name("uv")


def test_pip_install_gives_numpy_and_tritonclient_and_little_else(tmp_path):
    """`pip install .`, from the packages that `make` already downloaded."""
    python = tmp_path / "venv" / "bin" / "python"
    pinned = ["--require-hashes", "-r", str(ROOT / "requirements" / "client.txt")]
    install = [UV, "pip", "install", "-q", "--offline", "--python", python]
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, tmp_path / "venv"], check=True)
    done = subprocess.run([*install, *pinned], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("uv's cache does not hold the client's requirements: " + done.stderr.splitlines()[-1])
    subprocess.run([*install, "--no-deps", "setuptools"], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", ROOT], check=True)
    script = (
        "import sys, importlib.metadata as m, clip_embed\n"
        "assert not {'torch', 'PIL', 'httpx', 'typer', 'rich'} & set(sys.modules)\n"
        "print(len(list(m.distributions())))"
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout) <= 12
    command = tmp_path / "venv" / "bin" / "clip-embed"
    done = subprocess.run([command, "x.jpg"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'clip-embed[cli]'" in done.stderr
