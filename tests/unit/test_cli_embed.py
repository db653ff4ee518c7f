"""The command `clip-embed`, run as a process against a server on a loopback socket."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_client_loopback import Brain, serve, vector_of

pytest.importorskip("typer", reason="pip install 'clip-embed[cli]'")
pytest.importorskip("rich", reason="pip install 'clip-embed[cli]'")

from clip_embed.cli import find_images
from clip_embed.output import Format, open_output
from clip_embed.table import look_at

COMMAND = [sys.executable, "-W", "error", "-c", "from clip_embed.cli import main; main()"]


@pytest.fixture(scope="module")
def brain():
    return Brain()


@pytest.fixture(scope="module")
def url(brain):
    with serve("grpc", brain) as url:
        yield url


@pytest.fixture
def run(url, tmp_path):
    """Runs the command in tmp_path, where a.jpg, b.jpg and the bad c.jpg lie."""
    for name, content in {"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"bad:truncated:ends; [0] early"}.items():
        (tmp_path / name).write_bytes(content)

    def run(*arguments, stdin=b"", **env):
        env = {**os.environ, "INFERENCE_SERVICE_URL": url, **env}
        return subprocess.run(
            [*COMMAND, *arguments], check=False, capture_output=True, cwd=tmp_path, env=env, input=stdin
        )

    return run


def test_lines_are_in_order_and_floats_read_back_exactly(run):
    """Data on stdout and nothing on stderr; each number is the shortest text of its float32."""
    done = run("b.jpg", "a.jpg", "b.jpg", "--batch-size", "1")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["path"] for line in lines] == ["b.jpg", "a.jpg", "b.jpg"]
    for line, image in zip(lines, (b"b", b"a", b"b"), strict=True):
        assert np.array_equal(np.array(line["embedding"], np.float32), vector_of(image))
    assert max(len(number) for number in done.stdout.partition(b"[")[2].split(b", ")[:500]) <= 15


def test_a_failed_image_is_a_line_on_stderr_and_none_on_stdout(run):
    done = run("a.jpg", "c.jpg", "missing.jpg", "b.jpg")
    assert done.returncode == 1
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["a.jpg", "b.jpg"]
    assert done.stderr.decode().splitlines() == [
        "c.jpg: truncated: ends; [0] early",
        "missing.jpg: unreadable: No such file or directory",
    ]


@pytest.mark.parametrize("to_file", [True, False])
def test_npy_has_a_row_for_each_image_and_nan_for_a_failed_one(run, tmp_path, to_file):
    out = tmp_path / "out.npy"
    done = run("a.jpg", "c.jpg", "b.jpg", "--format", "npy", *(["-o", "out.npy"] if to_file else []))
    assert done.returncode == 1
    if not to_file:
        out.write_bytes(done.stdout)
    rows = np.load(out)
    assert (rows.shape, rows.dtype) == ((3, 512), np.float32)
    assert np.array_equal(rows[[0, 2]], [vector_of(b"a"), vector_of(b"b")])
    assert np.isnan(rows[1]).all()


def test_folders_are_searched_and_paths_come_from_stdin(run, tmp_path):
    """The command reads what find_images finds; a blank line is no path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.png").write_bytes(b"d")
    done = run("folder", "-", stdin=b"b.jpg\n\na.jpg")
    assert done.returncode == 0
    paths = [json.loads(line)["path"] for line in done.stdout.splitlines()]
    assert paths == [str(Path("folder", "d.png")), "b.jpg", "a.jpg"]


def test_a_folders_images_are_sorted_and_other_files_left_out(tmp_path):
    """A named file is taken whatever its suffix; a found one only with an image's."""
    for name in ("b.JPG", "a.webp", "notes.txt", "sub/z.jpeg", "sub/.DS_Store", "another/y.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([str(tmp_path), "notes.txt", "missing"], [])
    expected = [tmp_path / "a.webp", tmp_path / "b.JPG", tmp_path / "another/y.tiff", tmp_path / "sub/z.jpeg"]
    assert list(found) == [*map(str, expected), "notes.txt", "missing"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """After a failure the old file is as it was, and nothing lies beside it."""
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    def write_and_fail():
        with open_output(out, Format.jsonl) as output:
            output.add(look_at("a.jpg"), vector_of(b"a"))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail()
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
    with open_output(out, Format.jsonl) as output:
        output.add(look_at("a.jpg"), vector_of(b"a"))
    assert json.loads(out.read_text())["path"] == "a.jpg"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (["empty"], {}, "no images found in empty"),
        (["-"], {}, "no images found in -"),
        (["a.jpg", "--url", "ftp://x"], {}, "expected grpc://"),
        (["a.jpg"], {"INFERENCE_SERVICE_URL": "grpc://host"}, "grpc://host"),
        (["a.jpg", "--batch-size", "0"], {}, "--batch-size"),
        (["a.jpg", "--format", "csv"], {}, "--format"),
        (["a.jpg", "-o", "no/such/out.jsonl"], {}, "cannot write no/such/out.jsonl"),
    ],
)
def test_a_users_mistake_is_a_sentence(run, tmp_path, arguments, env, says):
    (tmp_path / "empty").mkdir()
    done = run(*arguments, **env)
    assert (done.returncode, done.stdout) == (2, b"")
    assert says in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_no_server_is_one_line_that_says_what_to_do(run):
    with serve("grpc", Brain()) as gone:
        pass
    done = run("a.jpg", "--url", gone)
    assert (done.returncode, done.stdout) == (3, b"")
    (line,) = done.stderr.decode().splitlines()
    assert gone in line
    assert "make serve" in line


def test_one_of_several_servers_is_enough(run, url):
    """The other one's absence is told."""
    with serve("grpc", Brain()) as gone:
        pass
    done = run("a.jpg", "b.jpg", "--batch-size", "1", "--url", f"{gone},{url}")
    assert done.returncode == 0
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["a.jpg", "b.jpg"]
    assert f"{gone} gets no requests until it is ready again" in done.stderr.decode()


def test_a_missing_extra_is_one_line_that_says_what_to_install():
    hidden = "import sys; sys.modules['typer'] = None; " + COMMAND[-1]
    done = subprocess.run([sys.executable, "-c", hidden], check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        "clip-embed: the command needs more packages: pip install 'clip-embed[cli]'"
    ]


@pytest.fixture
def waiting(run, url, brain, tmp_path):
    """The command's process, which has printed a.jpg's line or is about to, and waits for the second image."""
    brain.reset()
    (tmp_path / "wait.jpg").write_bytes(b"wait")
    with subprocess.Popen(
        [*COMMAND, "a.jpg", "wait.jpg", *["b.jpg"] * 50, "--batch-size", "1", "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        assert brain.waiting.acquire(timeout=30)
        yield process
        brain.gate.set()
        process.kill()


def test_ctrl_c_is_quiet_and_keeps_what_was_finished(waiting):
    line = waiting.stdout.readline()
    waiting.send_signal(signal.SIGINT)
    rest, talk = waiting.communicate(timeout=30)
    assert (waiting.returncode, rest, talk) == (130, b"", b"")
    assert json.loads(line)["path"] == "a.jpg"


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_no_part_of_a_file(url, brain, tmp_path):
    """A file that was being written goes, and what was there before stays."""
    brain.reset()
    (tmp_path / "wait.jpg").write_bytes(b"wait")
    (tmp_path / "out.npy").write_text("old")
    arguments = ["wait.jpg", "--url", url, "--format", "npy", "-o", "out.npy"]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert brain.waiting.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == b""
        assert process.returncode == 130
        process.kill()
    brain.gate.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "wait.jpg"]
    assert (tmp_path / "out.npy").read_text() == "old"


def test_a_server_that_goes_ends_the_run(url, brain, tmp_path):
    """What was finished is on stdout; then one line, not one for each image that is left."""
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "gone.jpg").write_bytes(b"fail:UNAVAILABLE:Socket closed")
    done = subprocess.run(
        [*COMMAND, "a.jpg", *["gone.jpg"] * 9, "--batch-size", "1", "--url", url, "--timeout-s", "2"],
        check=False,
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["a.jpg"]
    *log, line = done.stderr.decode().splitlines()
    assert "Socket closed" in line
    assert "gone.jpg" not in line
    assert all("no requests until" in line or "is ready again" in line for line in log)


def test_a_closed_pipe_is_quiet(waiting, brain):
    """As in `clip-embed photos | head -1`."""
    waiting.stdout.readline()
    waiting.stdout.close()
    brain.gate.set()
    assert waiting.stderr.read() == b""
    assert waiting.wait(timeout=30) == 141
