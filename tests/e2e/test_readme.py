"""The README's commands, run as they are written."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer

from clip_tools.cli import app
from clip_tools.paths import MODELS, ROOT
from clip_tools.repository import config_names
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import EmbeddedServer

README = (ROOT / "README.md").read_text()
PORTS = (8000, 8001, 8002)


def section(title: str) -> str:
    """The README's text below a heading."""
    return re.split(r"^## ", README.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def shell(text: str) -> str:
    """The indented shell lines of Markdown, as one script."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


def commands(title: str) -> str:
    """The shell lines of a section."""
    return shell(section(title))


@pytest.fixture(scope="module", autouse=True)
def _the_readmes_ports_are_free() -> None:
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port}, which the README's commands name, is in use")


@pytest.fixture(scope="module")
def environment(repository: Path) -> dict[str, str]:
    """A shell with .venv active, on the tests' model repository so that the user's model is left alone."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CLIP_MODELS": str(repository)}


@pytest.fixture(scope="module")
def served(light_text_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with EmbeddedServer(ServeOptions(models=light_text_repository, log=tmp_path_factory.mktemp("readme") / "log")):
        yield


@pytest.fixture
def folder(demo_photos: list[Path], tmp_path: Path) -> Path:
    """The folder that the commands assume: photo.jpg, other.jpg and photos/."""
    shutil.copy(demo_photos[0], tmp_path / "photo.jpg")
    shutil.copy(demo_photos[1], tmp_path / "other.jpg")
    (tmp_path / "photos").mkdir()
    for path in demo_photos[2:5]:
        shutil.copy(path, tmp_path / "photos")
    return tmp_path


def shell_process(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    done = shell_process(script, folder, environment)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_of_commands_is_run_here():
    tested = "\n".join(map(commands, ("One image in, one vector out", "The client", "Search and near-duplicates")))
    rest = [line for line in shell(README).splitlines() if line not in tested.splitlines()]
    assert [line.split("#")[0].strip() for line in rest] == ["make demo", "make test"]


def test_the_commands_in_the_text_exist():
    """Verbs, options, configurations and engines."""
    verbs = typer.main.get_command(app).commands
    text = README.replace('make serve ARGS="', "clip-tools serve ")
    found = [command.split() for command in re.findall(r"`clip-tools ([^`]*?)\"?`", text)]
    assert {verb for verb, *_ in found} == {"bench", "serve", "swap", "export-onnx"}
    for verb, *words in found:
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    engines = re.findall(r"`([a-z0-9-]+)`(?=:| or)", section("Choosing an engine"))
    assert len(engines) == 7
    assert set(engines) <= set(config_names(MODELS))


def test_make_demo(environment, demo_photos):
    """With the model exported already, as in a second run."""
    assert "    make demo " in README
    shown = run("make demo", ROOT, environment)
    for path in demo_photos:
        assert re.search(rf"^  {path.stem} +\d+ KB  [+-]0\.\d{{4}} ", shown, re.MULTILINE)
    assert "Similarity (cosine)" in shown


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_one_image_in_one_vector_out(served, folder, environment):
    serve, *lines = commands("One image in, one vector out").splitlines()
    assert serve.startswith("make serve")  # run by the fixture
    numbers = run("\n".join(lines), folder, environment)
    assert numbers.startswith("array('f', [")
    vector = np.frombuffer((folder / "answer.bin").read_bytes()[-2048:], np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    (folder / "photo.jpg").write_bytes(b"no image")
    done = shell_process("\n".join(lines), folder, environment)
    assert done.returncode != 0
    assert "not_an_image" in json.loads((folder / "answer.bin").read_text())["error"]


def test_the_client_and_search(served, folder, environment):
    install, *lines = commands("The client").splitlines()
    assert install.startswith("pip install .")  # tests/e2e/test_install.py
    python = re.search(r"```python\n(.*?)```", section("The client"), re.DOTALL)[1]
    (folder / "example.py").write_text(python + "print(embeddings.shape)\n")
    assert run("python -W error::UserWarning example.py", folder, environment) == "(2, 512)\n"
    run("\n".join(lines), folder, environment)
    assert len((folder / "vectors.jsonl").read_text().splitlines()) == 3
    assert np.load(folder / "vectors.npy").shape == (3, 512)
    shutil.copy(folder / "photo.jpg", folder / "photos" / "copy.jpg")
    shutil.copy(folder / "photo.jpg", folder / "photos" / "photo.jpg")
    run(commands("Search and near-duplicates"), folder, environment)
    for page in ("found.html", "duplicates.html"):
        assert "data:image/webp" in (folder / page).read_text()
