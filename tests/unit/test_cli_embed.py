"""The command `clip-embed`, against a server on a loopback socket."""

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

from tests.clip_embed_command import COMMAND, run_here


@pytest.fixture(scope="module")
def brain():
    return Brain()


@pytest.fixture(scope="module")
def url(brain):
    with serve("grpc", brain) as url:
        yield url


@pytest.fixture
def run(url, tmp_path, monkeypatch):
    """Runs the command in tmp_path, where a.jpg, b.jpg and the bad c.jpg lie."""
    for name, content in {"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"bad:truncated:ends; [0] early"}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    return run_here


def test_lines_are_in_order_and_floats_read_back_exactly(run):
    """Data on stdout and nothing on stderr; each number is the shortest text of its float32."""
    done = subprocess.run([*COMMAND, "b.jpg", "a.jpg", "b.jpg", "--batch-size", "1"], check=False, capture_output=True)
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
    """A blank line on stdin is skipped."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "d.png").write_bytes(b"d")
    done = run("folder", "-", stdin=b"b.jpg\n\na.jpg")
    assert done.returncode == 0
    paths = [json.loads(line)["path"] for line in done.stdout.splitlines()]
    assert paths == [str(Path("folder", "d.png")), "b.jpg", "a.jpg"]


def test_control_characters_in_a_name_are_escaped_in_all_output(run, tmp_path):
    """On stdout, in the line of a failed image and in usage errors. A list with NULs can contain any name."""
    (tmp_path / "\x1b[31m\n.jpg").write_bytes(b"a")
    (tmp_path / "bad\n\x1b]0;t\x07.jpg").write_bytes(b"bad:corrupt:no image")
    done = run("-", "-0", stdin=b"\x1b[31m\n.jpg\0bad\n\x1b]0;t\x07.jpg\0")
    assert done.returncode == 1
    assert json.loads(done.stdout)["path"] == r"\u001b[31m\u000a.jpg"
    assert done.stderr == b"bad\\u000a\\u001b]0;t\\u0007.jpg: corrupt: no image\n"
    for arguments in (["--\x1b[31m.jpg"], ["a.jpg", "-o", "\x1b[31m.txt"], ["a.jpg", "-o", "\x1b[31m/a.jsonl"]):
        done = run(*arguments)
        assert (done.returncode, b"\\u001b[31m" in done.stderr, b"\x1b" in done.stderr) == (2, True, False)


@pytest.mark.promise
@pytest.mark.slow
def test_no_odd_file_ends_a_run(run, tmp_path, record_reliability):
    """FIFOs, devices, link loops and huge files are lines on stderr. Every image has its row."""
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "fifo.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("missing")
    (folder / "closed").mkdir(mode=0)
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    good = [os.fsdecode(name) for name in (b"z.jpg", b"caf\xe9.jpg", b"\x1b[2J.jpg", b"far.jpg", b"past.jpg")]
    for name in good:
        (folder / name).write_bytes(b"good")
    os.utime(folder / "far.jpg", (0, 10_413_792_000))  # the year 2300
    os.utime(folder / "past.jpg", (0, -10_413_792_000))
    for output in ("v.jsonl", "v.parquet", "v.npy"):
        done = run("photos", "missing", "a" * 5000, "-o", output)
        assert done.returncode == 1, done.stderr
        failed = [line.split(":")[0].rpartition("/")[2] for line in done.stderr.decode().splitlines()]
        assert sorted(failed) == sorted(
            ["endless.jpg", "fifo.jpg", "huge.jpg", "loop.jpg", "nowhere.jpg", "missing", "a" * 5000]
            + ["closed"] * (os.geteuid() != 0)
        )
    rows = [json.loads(line)["path"] for line in (tmp_path / "v.jsonl").read_bytes().splitlines()]
    assert len(rows) == len(good)
    (folder / "closed").chmod(0o700)
    record_reliability("odd_files", faults=3 * len(failed), lost=0)


def test_files_skipped_in_folders_are_counted_on_stderr(run, tmp_path):
    for name in ("p/a.jpg", "p/@eaDir/a.jpg", "p/b.heic", "q/b.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a")
    done = run("p", "--exclude", "c*")
    assert done.returncode == 0
    assert done.stderr.decode() == (
        "skipped: 1 .heic (--all tries every file by its content); 1 litter folder (--include GLOB takes them)\n"
    )
    done = run("q")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no images found in q; skipped: 1 .heic" in done.stderr


def test_folders_are_searched_for_the_suffixes_of_the_server_or_with_all_for_every_file(run, tmp_path, brain):
    """The server sends the list, so that an older client takes the formats of a newer server."""
    for name in ("p/a.jpg", "p/b.heic", "p/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a")
    brain.parameters = {"clip_suffixes": ".jpg .heic"}
    try:
        done, everything = run("p"), run("p", "--all")
    finally:
        brain.parameters = None
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["p/a.jpg", "p/b.heic"]
    assert done.stderr == b"skipped: 1 without an ending (--all tries every file by its content)\n"
    assert [json.loads(line)["path"] for line in everything.stdout.splitlines()] == ["p/a.jpg", "p/b.heic", "p/c"]
    assert everything.stderr == b""


def test_an_image_on_stdin_in_place_of_a_list_exits_2_with_one_line(run):
    done = run("-", stdin=b"\xff\xd8\xff\xe0" + bytes(range(256)) * 100)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"clip-embed: stdin: expected a list of paths, got an image: give its path in place of -\n"


def test_the_backend_comes_from_the_environment(run):
    """As in `EmbeddingClient.from_env`. The PyTorch service speaks only HTTP, so a gRPC URL is an error."""
    done = run("a.jpg", INFERENCE_BACKEND="pytorch")
    assert done.returncode == 2
    assert b"the pytorch backend speaks only HTTP" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["empty"], {}, "no images found in empty"),
        (["-"], {}, "no images found in -"),
        (["a.jpg", "--url", "ftp://x"], {}, "expected grpc://"),
        (["a.jpg"], {"INFERENCE_SERVICE_URL": "grpc://host"}, "grpc://host"),
        (["a.jpg", "--batch-size", "0"], {}, "--batch-size"),
        (["a.jpg", "--format", "csv"], {}, "--format"),
        (["a.jpg", "-o", "no/such/out.jsonl"], {}, "cannot write no/such/out.jsonl"),
        (["a.jpg", "-o", "empty"], {}, "cannot write empty: Is a directory"),
        *(
            (["a.jpg", "-o", f"v.{ending}"], {}, "or say --format")
            for ending in ("npz", "json", "CSV", "parquet.gz", "jsonl~")
        ),
        (["a.jpg", "-o", "v.Parquet", "--format", "npy"], {}, "ends with .parquet, and --format is npy"),
        (["a.jpg", "-0"], {}, "-0 is for paths on stdin"),
    ],
)
def test_a_usage_error_exits_2_with_a_message(run, tmp_path, arguments, env, message):
    (tmp_path / "empty").mkdir()
    done = run(*arguments, **env)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()


def test_without_a_server_it_exits_3_with_one_line_that_says_what_to_do(run):
    with serve("grpc", Brain()) as gone:
        pass
    done = run("a.jpg", "--url", gone)
    assert (done.returncode, done.stdout) == (3, b"")
    (line,) = done.stderr.decode().splitlines()
    assert gone in line
    assert "make serve" in line


def test_one_of_several_servers_is_enough(run, url):
    """A warning names the lost server."""
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


def test_paths_that_do_not_exist_exit_2_before_a_server_is_contacted(run):
    """Only if none exists: a missing path among others is a failed image."""
    done = run("photoz/", "b.jqg", "--url", "grpc://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"clip-embed: no such file or folder: photoz/, b.jqg\n"


@pytest.fixture
def waiting(run, url, brain, tmp_path, ctrl_c):
    """A process of the command, which prints a.jpg's line and then waits for the second image."""
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


def test_ctrl_c_keeps_the_finished_rows_and_prints_their_number_in_one_line(waiting):
    line = waiting.stdout.readline()
    waiting.send_signal(signal.SIGINT)
    rest, stderr = waiting.communicate(timeout=30)
    assert (waiting.returncode, rest, stderr) == (130, b"", b"clip-embed: interrupted after 1 embeddings\n")
    assert json.loads(line)["path"] == "a.jpg"


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_no_part_of_a_file(url, brain, tmp_path):
    """The unfinished file is removed, and the old file stays."""
    brain.reset()
    (tmp_path / "wait.jpg").write_bytes(b"wait")
    (tmp_path / "out.npy").write_text("old")
    arguments = ["wait.jpg", "--url", url, "--format", "npy", "-o", "out.npy"]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert brain.waiting.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1].decode()
        assert stderr.startswith("clip-embed: interrupted after 0 embeddings; nothing was written: --resume")
        assert stderr.count("\n") == 1
        assert process.returncode == 130
        process.kill()
    brain.gate.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "wait.jpg"]
    assert (tmp_path / "out.npy").read_text() == "old"


def test_a_lost_server_ends_the_run(run, tmp_path):
    """Finished rows are on stdout. Stderr has one line, not one for each remaining image."""
    (tmp_path / "gone.jpg").write_bytes(b"fail:UNAVAILABLE:Socket closed")
    done = run("a.jpg", *["gone.jpg"] * 9, "--batch-size", "1", "--timeout-s", "2")
    assert done.returncode == 3
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["a.jpg"]
    *log, line = done.stderr.decode().splitlines()
    assert "Socket closed" in line
    assert "gone.jpg" not in line
    assert all("no requests until" in line or "is ready again" in line for line in log)


def test_a_server_that_comes_back_with_other_weights_ends_the_run(url, brain, tmp_path):
    brain.reset()
    brain.parameters = {"clip_model": "ViT-B-32", "clip_checkpoint": "one", "clip_preprocess": "exact"}
    (tmp_path / "wait.jpg").write_bytes(b"wait")
    (tmp_path / "a.jpg").write_bytes(b"a")
    command = [*COMMAND, "wait.jpg", "a.jpg", "--batch-size", "1", "--max-in-flight", "1", "--url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert brain.waiting.acquire(timeout=30)
        brain.refusals = [("UNAVAILABLE", "Socket closed")]  # for a.jpg
        brain.parameters = {**brain.parameters, "clip_checkpoint": "two"}
        brain.gate.set()
        out, stderr = process.communicate(timeout=30)
    brain.reset()
    assert process.returncode == 3
    assert [json.loads(line)["path"] for line in out.splitlines()] == ["wait.jpg"]
    assert "came back with other weights: ViT-B-32, two, preprocess exact; before" in stderr.decode()


def test_a_closed_pipe_ends_the_run_without_a_message(waiting, brain):
    """For example `clip-embed photos | head -1`."""
    waiting.stdout.readline()
    waiting.stdout.close()
    brain.gate.set()
    assert waiting.stderr.read() == b""
    assert waiting.wait(timeout=30) == 141
