"""`clip-embed --resume`: what is finished is kept however a run ends, and at the end every image is there once."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from test_client_loopback import Brain, serve, vector_of

pytest.importorskip("typer", reason="pip install 'clip-embed[cli]'")
pytest.importorskip("rich", reason="pip install 'clip-embed[cli]'")

from tests.clip_embed_command import COMMAND, run_here

from clip_embed import jsonl, parquet, resume
from clip_embed.provenance import Provenance
from clip_embed.resume import open_resumed
from clip_embed.table import UnusableOutput, has_parts, parts_folder, stat_image


def parquet_or_skip():
    pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")
    return parquet.require_pyarrow()


@pytest.fixture(params=["jsonl", "parquet"])
def table(request):
    if request.param == "parquet":
        parquet_or_skip()
    return {"jsonl": jsonl, "parquet": parquet}[request.param]


@pytest.fixture
def out(table, tmp_path):
    return tmp_path / f"vectors.{table.__name__.rpartition('.')[2]}"


@pytest.fixture
def photos(tmp_path):
    """Twelve files, each with its name as its bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02d}.jpg").write_bytes(b"%02d.jpg" % index)
    return sorted(folder.iterdir())


def rows_of(out: Path) -> dict[str, np.ndarray]:
    """The embedding of each path; no path may be there twice."""
    if out.suffix == ".jsonl":
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        rows = [(line["path"], line["embedding"]) for line in lines]
    else:
        columns = parquet_or_skip().parquet.read_table(out).to_pydict()
        rows = list(zip(columns["path"], columns["embedding"], strict=True))
    assert len(dict(rows)) == len(rows)
    return {path: np.array(embedding, np.float32) for path, embedding in rows}


def assert_has(out, images):
    """Exactly these images, each with the vector of what is in the file now."""
    rows = rows_of(out)
    assert sorted(rows) == sorted(map(str, images))
    for path, row in rows.items():
        assert np.array_equal(row, vector_of(Path(path).read_bytes()))


def embed(out, table, paths, *, stop_after=None):
    """As the command does it; returns what had to be embedded. Stops by an exception."""
    embedded = []
    with open_resumed(out, table) as output:
        for image in output.unfinished(map(str, paths)):
            if len(embedded) == stop_after:
                raise InterruptedError
            content = Path(image.path).read_bytes()
            output.add(image, None if content.startswith(b"bad") else vector_of(content))
            embedded.append(Path(image.path))
    return embedded


def test_a_run_that_stopped_is_gone_on_with(out, table, photos):
    """What it finished is not embedded again, and the order is that of the images."""
    with pytest.raises(InterruptedError):
        embed(out, table, photos, stop_after=7)
    assert not out.exists()
    assert embed(out, table, photos) == photos[7:]
    assert list(rows_of(out)) == list(map(str, photos))
    assert_has(out, photos)
    assert not parts_folder(out).exists()
    before = out.stat()
    assert embed(out, table, photos) == []
    assert out.stat() == before  # with nothing new the file is left as it is


def test_only_new_changed_and_failed_images_are_embedded_again(out, table, photos):
    embed(out, table, photos[:4])
    photos[0].write_bytes(b"other content")
    photos[1].write_bytes(b"bad now")
    os.utime(photos[2], ns=(0, 0))
    assert embed(out, table, photos[:6]) == [*photos[:3], *photos[4:6]]
    assert_has(out, [photos[0], *photos[2:6]])  # a vector of what the bad file was before would be a lie
    photos[1].write_bytes(b"good again")
    assert embed(out, table, photos[:6]) == [photos[1]]
    assert_has(out, photos[:6])


def test_rows_of_images_that_were_not_named_stay_and_of_those_that_are_gone_until_they_are_pruned(out, table, photos):
    embed(out, table, photos[:4])
    photos[0].unlink()
    embed(out, table, photos[4:])
    assert sorted(rows_of(out)) == sorted(map(str, photos))
    with open_resumed(out, table, prune=True) as output:
        assert list(output.unfinished([])) == []
    assert output.pruned == 1
    assert_has(out, photos[1:])


def test_an_image_that_is_named_twice_is_there_once(out, table, photos):
    assert embed(out, table, [photos[0], photos[1], photos[0]]) == photos[:2]
    assert_has(out, photos[:2])


def test_many_parts_become_one_table(out, table, photos, monkeypatch):
    """More rows than a part and than a row group hold."""
    monkeypatch.setattr(resume, "PART_ROWS", 2)
    monkeypatch.setattr(parquet, "ROW_GROUP", 5)
    embed(out, table, photos)
    assert list(rows_of(out)) == list(map(str, photos))
    assert_has(out, photos)


def test_a_path_that_is_not_utf8_is_named_and_found_again(out, table, photos, tmp_path):
    """And one with what a terminal would obey, in a file whose names any reader takes; and that is not gone."""
    odd = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in (b"caf\xe9.jpg", b"\x1b[2Ja\nb.jpg")]
    for path in odd:
        path.write_bytes(b"odd")
    assert embed(out, table, odd) == odd
    assert embed(out, table, [*odd, photos[0]]) == [photos[0]]
    names = [name.rpartition("/")[2] for name in rows_of(out)]
    assert names == [r"caf\udce9.jpg", r"\u001b[2Ja\u000ab.jpg", "00.jpg"]
    with open_resumed(out, table, prune=True) as output:
        assert output.pruned == 0


@pytest.mark.parametrize("year", [1600, 2300])
def test_a_file_of_any_year_has_its_row(out, table, photos, year):
    """Nanoseconds of 64 bits end in 2262."""
    try:
        os.utime(photos[0], (0, (year - 1970) * 31_556_952))
    except OSError:
        pytest.skip(f"the file system has no year {year}")
    assert embed(out, table, photos[:2]) == photos[:2]
    assert embed(out, table, photos[:2]) == []
    assert_has(out, photos[:2])


def test_the_columns_of_parquet_are_typed(tmp_path, photos):
    pyarrow = parquet_or_skip()
    embed(tmp_path / "v.parquet", parquet, photos)
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert [f"{field.name} {field.type}" for field in table.schema] == [
        "path string",
        "size_bytes int64",
        "mtime_ns int64",
        "embedding fixed_size_list<element: float>[512]",
    ]
    assert table["size_bytes"].to_pylist() == [6] * 12
    assert table["mtime_ns"].to_pylist() == [path.stat().st_mtime_ns for path in photos]


def test_a_torn_last_line_is_no_line(tmp_path, photos):
    """As `clip-embed photos > vectors.jsonl` leaves it when it is killed."""
    out = tmp_path / "v.jsonl"
    embed(out, jsonl, photos[:3])
    whole = out.read_bytes()
    for cut in (1, 100, 6000):
        out.write_bytes(whole[:-cut])
        assert embed(out, jsonl, photos[:3]) == [photos[2]]
        assert_has(out, photos[:3])


@pytest.mark.parametrize("content", [b"no table\n", b'{"path": "a", "embedding": 1}\n', b"[]\n"])
def test_a_file_of_something_else_is_left_alone(out, table, photos, content):
    out.write_bytes(content)
    with pytest.raises(UnusableOutput, match=str(out)):
        embed(out, table, photos)
    assert out.read_bytes() == content
    assert not parts_folder(out).exists()


def test_a_parquet_file_of_something_else_is_named(tmp_path, photos):
    pyarrow = parquet_or_skip()
    out = tmp_path / "v.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"], "vector": [1.5]}), out)
    with pytest.raises(UnusableOutput, match="path string, vector double"):
        embed(out, parquet, photos)


def test_two_runs_cannot_share_an_output(out, table, photos):
    with open_resumed(out, table), pytest.raises(UnusableOutput, match="in use by another clip-embed"):
        embed(out, table, photos)
    assert embed(out, table, photos) == photos


@pytest.mark.parametrize("full_at", range(1, 6))
def test_a_full_disk_costs_nothing_that_was_finished(out, table, photos, monkeypatch, full_at):
    """Whichever part, or the merged file, does not fit: the earlier parts are there, and no half of a file."""
    monkeypatch.setattr(resume, "PART_ROWS", 3)
    calls = 0

    def fsync(_):
        nonlocal calls
        calls += 1
        if calls >= 2 * full_at - 1:  # each file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            embed(out, table, photos)
    assert not out.exists()
    kept = 3 * (full_at - 1)
    assert all(path.suffix == ".part" for path in (parts_folder(out).iterdir() if kept else []))
    assert embed(out, table, photos) == photos[kept:]
    assert_has(out, photos)


KILL = """
import os, signal, sys
from pathlib import Path
from clip_embed import jsonl, parquet, resume
from test_client_loopback import vector_of

folder, name, moments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
table = {"jsonl": jsonl, "parquet": parquet}[name]
resume.PART_ROWS = 4
photos = sorted(map(str, (folder / "photos").iterdir()))


def embed(out):
    with resume.open_resumed(out, table) as output:
        for image in output.unfinished(photos):
            output.add(image, vector_of(Path(image.path).read_bytes()))


def run(out, kill_at=0, report=None):
    "Embeds in a process of its own, which kills itself at its n-th step; its exit code."
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = 0

    def step(frame, event, argument):
        nonlocal steps
        if "clip_embed" in frame.f_code.co_filename and event in ("call", "c_call"):
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    embed(out)
    sys.setprofile(None)
    if report is not None:
        os.write(report, b"%d" % steps)
    os._exit(0)


embed(folder / f"first.{name}")  # what is imported late is imported now
reader, writer = os.pipe()
assert run(folder / f"vectors.{name}", report=writer) == 0
steps = int(os.read(reader, 99))
for moment in range(moments):
    kill_at = 1 + moment * steps // moments
    out = folder / f"killed at {kill_at}" / f"vectors.{name}"
    out.parent.mkdir()
    assert run(out, kill_at) == -signal.SIGKILL
    run(out, kill_at * 2 // 3)  # killed again, or not: what is finished takes no steps
    assert run(out) == 0
print(steps)
"""
MOMENTS = {"jsonl": 40, "parquet": 24}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_moment_every_image_is_there_once(out, table, photos, tmp_path, record_reliability, share):
    """A kill -9 at moments spread over a whole run, in the midst of writing too, and then often a second one."""
    name = out.suffix.removeprefix(".")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    moments = int(MOMENTS[name] * share)
    done = subprocess.run(
        [sys.executable, "-c", KILL, tmp_path, name, str(moments)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    killed = list(tmp_path.glob("killed at *"))
    assert len(killed) == moments < int(done.stdout)
    for folder in killed:
        assert_has(folder / out.name, photos)
        assert [path.name for path in folder.iterdir()] == [out.name]
    record_reliability(f"faults_resume_{name}", faults=len(killed), lost=0, twice=0)


@pytest.fixture(scope="module")
def brain():
    return Brain()


@pytest.fixture(scope="module")
def url(brain):
    with serve("grpc", brain) as url:
        yield url


@pytest.fixture
def here(url, brain, tmp_path, monkeypatch):
    """Where the command runs; its parts hold five images each."""
    brain.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    monkeypatch.setattr(resume, "PART_ROWS", 5)


@pytest.fixture
def run(here):
    """Runs the command: its exit code, stdout and stderr."""

    def run(*arguments):
        done = run_here(*arguments, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def start(here):
    """Starts the command as a process, after this Python code."""
    *python, main = COMMAND

    def start(*arguments, before=""):
        code = f"import clip_embed.resume as r; r.PART_ROWS = 5; {before}{main}"
        return subprocess.Popen([*python, code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(
    ("table", "number"),
    [("parquet", signal.SIGKILL), ("jsonl", signal.SIGTERM), ("parquet", signal.SIGINT)],
    indirect=["table"],
)
@pytest.mark.usefixtures("ctrl_c")
def test_the_command_goes_on_after_a_signal(start, run, brain, out, table, photos, number):
    """The eighth image waits at the server: the first five are a part by then, and are not asked for again."""
    photos[7].write_bytes(b"wait")
    arguments = ("photos", "--out", out.name, "--resume", "--batch-size=1", "--max-in-flight=1")
    with start(*arguments) as process:
        assert brain.waiting.acquire(timeout=60)
        process.send_signal(number)
        process.wait(60)
        said = process.communicate()[1]
    assert not out.exists()
    if number == signal.SIGINT:
        assert said == (
            f"clip-embed: interrupted after 7 embeddings; finished rows are kept in {out.name}.parts: "
            "run it again with --resume\n"
        )
    brain.gate.set()
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (0, "")
    assert "of the images were there already" in stderr
    assert_has(out, [path.relative_to(out.parent) for path in photos])
    assert all(brain.embedded.count(b"%02d.jpg" % index) == 1 for index in range(5))


@pytest.mark.parametrize("table", ["parquet"], indirect=True)
def test_a_failed_image_is_reported_each_time_until_it_is_mended(run, brain, out, table, photos):
    photos[3].write_bytes(b"bad:corrupt:no image")
    photos[5].write_bytes(b"bad:empty:0 bytes")
    arguments = ("photos", "-o", out.name, "--resume")
    for _ in range(2):
        code, _, stderr = run(*arguments)
        assert code == 1
        assert stderr.splitlines()[:2] == ["photos/03.jpg: corrupt: no image", "photos/05.jpg: empty: 0 bytes"]
    photos[3].write_bytes(b"good")
    code, _, stderr = run(*arguments)
    assert (code, stderr) == (1, "photos/05.jpg: empty: 0 bytes\n10 of the images were there already\n")
    assert_has(out, [path.relative_to(out.parent) for path in photos if path != photos[5]])
    assert brain.embedded.count(b"00.jpg") == 1


@pytest.mark.parametrize("table", ["jsonl"], indirect=True)
def test_a_server_that_goes_leaves_what_was_finished(run, out, table, photos):
    """And the last line says how to go on."""
    photos[8].write_bytes(b"fail:UNAVAILABLE:Socket closed")
    arguments = ("photos", "-o", out.name, "--resume", "--batch-size=1", "--max-in-flight=1")
    code, _, stderr = run(*arguments, "--timeout-s=2")
    assert code == 3
    assert f"finished rows are kept in {out.name}.parts: run it again with --resume" in stderr.splitlines()[-1]
    photos[8].write_bytes(b"good")
    code, _, stderr = run(*arguments)
    assert (code, stderr) == (0, "8 of the images were there already\n")


def test_a_limit_of_the_disk_is_a_sentence_and_nothing_is_lost(start, run, out, table, photos):
    """Files of at most 40 KB: the parts fit, what they make together does not."""
    limit_bytes = {"jsonl": 40_000, "parquet": 22_000}[out.suffix.removeprefix(".")]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes})); "
    with start("photos", "-o", out.name, "--resume", before=limit) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"cannot write {out.name}: File too large; finished rows are kept in {out.name}.parts" in stderr
    code, _, stderr = run("photos", "-o", out.name, "--resume")
    assert (code, stderr) == (0, "12 of the images were there already\n")
    assert len(rows_of(out)) == 12


@pytest.mark.parametrize("table", ["jsonl"], indirect=True)
def test_parts_are_not_forgotten_by_a_run_that_does_not_resume(run, out, table, photos):
    with pytest.raises(InterruptedError):
        embed(out, table, photos, stop_after=7)
    code, _, stderr = run("photos", "-o", out.name)
    assert code == 2
    assert f"{out.name}.parts has finished rows of an earlier run: add --resume" in stderr
    assert has_parts(out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume"], "--resume needs --output FILE"),
        (["--resume", "-o", "v.npy"], "npy does not name its images"),
        (["--resume", "-o", "no/such/v.jsonl"], "cannot write no/such/v.jsonl: No such file or directory"),
        (["--resume", "-o", "photos/00.jpg", "--format", "jsonl"], "photos/00.jpg, line 1: expected"),
        (["--resume", "-o", "/dev/null"], "needs a regular file: /dev/null is not one"),
        (["--prune", "-o", "v.jsonl"], "--prune needs --resume"),
    ],
)
def test_a_users_mistake_is_a_sentence(run, photos, arguments, says):
    photos[0].write_bytes(b"a line\n")
    code, stdout, stderr = run("photos", *arguments)
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert stderr.count("\n") == 1


def test_the_format_follows_the_name(run, tmp_path, photos):
    """Also of a table that is written in one piece, or to stdout; a name without an ending has JSON lines."""
    parquet_or_skip()
    images = [path.relative_to(tmp_path) for path in photos]
    for name in ("v.parquet", "v.jsonl", "v", "w.PARQUET"):
        assert run("photos", "--out", name) == (0, "", "")
    assert run("photos", "--out", "v.npy") == (0, "", "")
    assert (tmp_path / "v").read_bytes() == (tmp_path / "v.jsonl").read_bytes()
    assert (tmp_path / "w.PARQUET").read_bytes() == (tmp_path / "v.parquet").read_bytes()
    assert (tmp_path / "v.npy.paths").read_text().splitlines() == list(map(str, images))
    assert list(rows_of(tmp_path / "v.parquet")) == list(rows_of(tmp_path / "v.jsonl")) == list(map(str, images))
    assert np.load(tmp_path / "v.npy").shape == (12, 512)


def test_parquet_without_its_extra_says_what_to_install(run, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, stderr = run("photos", "-o", "v.parquet")
    assert (code, stderr) == (2, "clip-embed: parquet needs pyarrow: pip install 'clip-embed[parquet]'\n")


def test_a_file_that_changes_while_it_is_embedded_is_embedded_again(out, table, photos):
    """What is kept beside the vector is how the file was before it was read."""
    with open_resumed(out, table) as output:
        (image,) = output.unfinished([str(photos[0])])
        photos[0].write_bytes(b"changed meanwhile")
        output.add(image, vector_of(b"00.jpg"))
    assert image != stat_image(str(photos[0]))
    assert embed(out, table, photos[:1]) == photos[:1]
    assert_has(out, photos[:1])


ONE, OTHER = Provenance("ViT-B-32", "a" * 64, "exact"), Provenance("ViT-B-32", "b" * 64, "exact")


@pytest.mark.parametrize("after", [OTHER, Provenance("ViT-B-32", "a" * 64, "fast"), None])
@pytest.mark.parametrize("is_killed", [False, True])
def test_vectors_of_another_server_do_not_get_into_one_file(out, table, photos, is_killed, after):
    """Whether a run ended well or left its parts; and nothing of what is there is changed."""
    with (
        pytest.raises(InterruptedError) if is_killed else nullcontext(),
        open_resumed(out, table, provenance=ONE) as output,
    ):
        for image in output.unfinished(map(str, photos[:3])):
            output.add(image, vector_of(Path(image.path).read_bytes()))
        if is_killed:
            raise InterruptedError
    with (
        pytest.raises(
            UnusableOutput, match=r"has vectors of ViT-B-32, checkpoint aaaaaaaaaaaa\.\.\., .*write to a new"
        ),
        open_resumed(out, table, provenance=after),
    ):
        pass
    with open_resumed(out, table, provenance=ONE) as output:
        for image in output.unfinished(map(str, photos)):
            output.add(image, vector_of(Path(image.path).read_bytes()))
    assert (output.already_embedded, output.warning) == (3, None)
    assert table.read_provenance(out) == ONE
    assert_has(out, photos)


def test_a_file_of_an_earlier_version_is_gone_on_with_and_stays_one_of_unknown_weights(run, out, table, photos, brain):
    embed(out, table, photos[:4])
    brain.says = {"clip_model": "ViT-B-32", "clip_checkpoint": "tag", "clip_preprocess": "exact"}
    code, _, stderr = run(str(out.parent / "photos"), "--out", out.name, "--resume")
    assert code == 0
    assert "does not name the weights of its vectors" in stderr
    assert_has(out, photos)
    assert table.read_provenance(out) is None
    code, _, stderr = run("photos", "--out", f"new-{out.name}", "--resume")
    assert (code, stderr) == (0, "")
    assert table.read_provenance(out.with_name(f"new-{out.name}")) == Provenance("ViT-B-32", "tag", "exact")
