"""`clip-tools embed-dataset` with the real server and a real Ray."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from tests.e2e.test_library import COMMAND as CLIP_EMBED
from typer.testing import CliRunner

from clip_embed import EmbeddingClient
from clip_embed.library import read_library
from clip_tools.cli import app
from clip_tools.errors import ToolError

pytest.importorskip("ray", reason="needs Ray: pip install 'clip-embed[ray]'")

COMMAND = Path(sys.executable).with_name("clip-tools")
TEMPORARY = f"/tmp/ray-{os.getpid()}"  # noqa: S108  short: Ray's socket names begin with it, and their length is limited
BROKEN = b"\xff\xd8\xff\xe0 no photograph"


@pytest.fixture
def start(server, tmp_path):
    """Starts the command against the server. The name of Ray's folder identifies this test's processes."""

    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, "INFERENCE_SERVICE_URL": server.options.grpc_url, "RAY_TMPDIR": TEMPORARY}
        arguments = (COMMAND, "embed-dataset", *arguments)
        started.append(subprocess.Popen(arguments, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # the test failed
            process.terminate()
            process.wait(60)
    shutil.rmtree(TEMPORARY, ignore_errors=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of the command; its stderr."""
    _, stderr = process.communicate(timeout=400)
    assert "Traceback" not in stderr
    return stderr


def rows(folder: Path) -> list[dict[str, object]]:
    return [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def make_folder(folder: Path, photographs: list[Path], count: int) -> set[str]:
    """Write `count` images, every seventh broken; their paths."""
    folder.mkdir()
    for number in range(count):
        content = BROKEN if number % 7 == 0 else photographs[number % len(photographs)].read_bytes()
        (folder / f"{number:03}.jpg").write_bytes(content)
    return {str(path) for path in folder.iterdir()}


def is_alive(word: str) -> bool:
    """Whether a process has this word in its command line."""
    lines = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    return word in lines


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_files_shards_and_tables_become_rows_that_search_reads(start, server, tmp_path, demo_photos, monkeypatch):
    """Each image has a row with the server's vector or an error. A second run embeds nothing."""
    source, first = tmp_path / "library", demo_photos[0].read_bytes()
    expected = make_folder(source, demo_photos, 8)
    (source / "notes.txt").write_text("no image")
    (source / "gone.jpg").symlink_to("nowhere")
    with tarfile.open(source / "shard.tar", "w") as shard:
        for name, content in (("1.jpg", first), ("1.json", b"{}"), ("2.jpg", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    (source / "cut.tar").write_bytes((source / "shard.tar").read_bytes()[:2000])
    images = [{"bytes": first, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    pq.write_table(pa.table({"image": images}), source / "table.parquet")
    names = ("gone.jpg", "shard.tar/1.jpg", "shard.tar/2.jpg", "cut.tar", "table.parquet#0", "table.parquet#1")
    expected |= {f"{source}/{name}" for name in names}

    process = start("library", "out")
    stderr = finish(process)
    assert process.returncode == 1, stderr
    assert "14 images in 4 parts of out, 6 failed; skipped:" in stderr
    assert "1 .txt" in stderr
    assert "1 .json" in stderr
    found = {row["path"]: row for row in rows(tmp_path / "out")}
    assert len(rows(tmp_path / "out")) == len(found)
    assert set(found) == expected
    codes = Counter(str(row["error"]).partition(":")[0] for row in found.values() if np.isnan(row["embedding"]).any())
    assert codes == {"truncated": 2, "empty": 1, "unreadable": 3}
    with EmbeddingClient(server.options.grpc_url) as client:
        vector = client.embed([first])[0]
        provenance = client.served().provenance
    for name in ("shard.tar/1.jpg", "table.parquet#0"):
        assert np.dot(found[f"{source}/{name}"]["embedding"], vector) >= 0.99999  # FP32, in another batch
    library = read_library(tmp_path / "out")
    assert library.provenance == provenance
    assert {image.path for image in library.images} == {path for path, row in found.items() if row["error"] is None}
    search = [CLIP_EMBED, "search", "out", demo_photos[0], "-k", "1", "--url", server.options.grpc_url]
    assert subprocess.run(search, cwd=tmp_path, capture_output=True, check=False).returncode == 0

    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(app, ["embed-dataset", "library", "out", "--url", server.options.grpc_url])
    assert f"{len(expected)} images in 4 parts exist already" in again.stderr


@pytest.mark.long
def test_local_actors_give_the_vectors_of_the_server(start, server, repository, tmp_path, demo_photos):
    make_folder(tmp_path / "library", demo_photos, 8)
    stderr = finish(start("library", "out", "--local", "--models", repository, "--url", "grpc://localhost:1"))
    assert "8 images in 1 parts of out, 2 failed" in stderr
    library = read_library(tmp_path / "out")
    with EmbeddingClient(server.options.grpc_url) as client:
        expected = client.embed([image.path for image in library.images])
        assert library.provenance == client.served().provenance
    assert len(expected) == 6
    assert ((library.embeddings * expected).sum(axis=1) >= 0.99999).all()  # FP32, in another batch


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere", "out"), 2, "nowhere: no such file or folder"),
        (("what://is/this", "out"), 2, "what://is/this"),
        (("empty", "out"), 2, "no images, .tar or .parquet files found"),
        ((".", "out", "--url", "grpc://localhost:1"), 3, "no server at grpc://localhost:1"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_wrong_argument_is_an_error_of_one_sentence(
    server, tmp_path, demo_photos, monkeypatch, arguments, code, message
):
    make_folder(tmp_path / "library", demo_photos, 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", server.options.grpc_url)
    error = CliRunner().invoke(app, ["embed-dataset", *arguments]).exception
    assert isinstance(error, ToolError)
    assert (error.exit_code, message in str(error)) == (code, True)


def test_a_missing_ray_cluster_is_an_error_of_one_line(start, tmp_path, demo_photos):
    make_folder(tmp_path / "library", demo_photos, 1)
    process = start("library", "out", "--address", "localhost:1")
    assert "no Ray cluster at localhost:1" in finish(process)
    assert process.returncode == 1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own, of the cluster that this process starts
def test_a_node_that_is_killed_loses_no_image(start, tmp_path, demo_photos):
    """Two nodes with an actor each. No image is lost or written twice."""
    from ray.cluster_utils import Cluster

    expected = make_folder(tmp_path / "library", demo_photos, 160)
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        lost = cluster.add_node(**node)
        process = start("library", "out", "--address", cluster.address, "--part-images", "10")
        wait_for_parts(process, tmp_path / "out", 3)
        cluster.remove_node(lost, allow_graceful=False)
        at_loss = len(list((tmp_path / "out").glob("*.parquet")))
        stderr = finish(process)
    finally:
        cluster.shutdown()
    assert at_loss < 16, "the node was killed too late"
    assert process.returncode == 1, stderr  # some are broken
    found = rows(tmp_path / "out")
    assert Counter(row["path"] for row in found) == Counter(expected)
    assert sum(row["error"] is not None for row in found) == 23
    assert not list((tmp_path / "out").glob("*.unfinished"))


@pytest.mark.long
def test_ctrl_c_leaves_no_process_and_the_next_run_continues(start, tmp_path, demo_photos, ctrl_c):
    expected = make_folder(tmp_path / "library", demo_photos, 100)
    process = start("library", "out", "--part-images", "5")
    wait_for_parts(process, tmp_path / "out", 2)
    assert is_alive(TEMPORARY)
    process.send_signal(signal.SIGINT)
    finish(process)
    assert process.returncode == 130
    deadline = time.monotonic() + 30
    while is_alive(TEMPORARY) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not is_alive(TEMPORARY)
    there = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out").glob("*.parquet")}
    assert "exist already" in finish(start("library", "out", "--part-images", "5"))
    assert Counter(row["path"] for row in rows(tmp_path / "out")) == Counter(expected)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ns for name, time_ns in there.items())


def wait_for_parts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while len(list(folder.glob("*.parquet"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
