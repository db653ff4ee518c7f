"""`clip-embed --resume` keeps finished rows however a run ends, and the output has every image once."""

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
    """The embedding of each path. Fails if a path is there twice."""
    if out.suffix == ".jsonl":
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        rows = [(line["path"], line["embedding"]) for line in lines]
    else:
        columns = parquet_or_skip().parquet.read_table(out).to_pydict()
        rows = list(zip(columns["path"], columns["embedding"], strict=True))
    assert len(dict(rows)) == len(rows)
    return {path: np.array(embedding, np.float32) for path, embedding in rows}


def assert_has(out, images):
    """Fails unless the output has exactly these images, each with the vector of its current content."""
    rows = rows_of(out)
    assert sorted(rows) == sorted(map(str, images))
    for path, row in rows.items():
        assert np.array_equal(row, vector_of(Path(path).read_bytes()))


def embed(out, table, paths, *, stop_after=None):
    """Embeds as the command does and returns the images it embedded. `stop_after` ends it by an exception."""
    embedded = []
    with open_resumed(out, table) as output:
        for image in output.unfinished(map(str, paths)):
            if len(embedded) == stop_after:
                raise InterruptedError
            content = Path(image.path).read_bytes()
            output.add(image, None if content.startswith(b"bad") else vector_of(content))
            embedded.append(Path(image.path))
    return embedded


def test_an_interrupted_run_is_resumed(out, table, photos):
    """Finished images are not embedded again, and the rows are in the order of the images."""
    with pytest.raises(InterruptedError):
        embed(out, table, photos, stop_after=7)
    assert not out.exists()
    assert embed(out, table, photos) == photos[7:]
    assert list(rows_of(out)) == list(map(str, photos))
    assert_has(out, photos)
    assert not parts_folder(out).exists()
    before = out.stat()
    assert embed(out, table, photos) == []
    assert out.stat() == before  # with nothing new the file is not rewritten


def test_only_new_changed_and_failed_images_are_embedded_again(out, table, photos):
    embed(out, table, photos[:4])
    photos[0].write_bytes(b"other content")
    photos[1].write_bytes(b"bad now")
    os.utime(photos[2], ns=(0, 0))
    assert embed(out, table, photos[:6]) == [*photos[:3], *photos[4:6]]
    assert_has(out, [photos[0], *photos[2:6]])  # without the old vector of the file that is now bad
    photos[1].write_bytes(b"good again")
    assert embed(out, table, photos[:6]) == [photos[1]]
    assert_has(out, photos[:6])


def test_rows_of_images_that_were_not_given_stay_and_prune_removes_those_of_deleted_ones(out, table, photos):
    embed(out, table, photos[:4])
    photos[0].unlink()
    embed(out, table, photos[4:])
    assert sorted(rows_of(out)) == sorted(map(str, photos))
    with open_resumed(out, table, prune=True) as output:
        assert list(output.unfinished([])) == []
    assert output.pruned == 1
    assert_has(out, photos[1:])


def test_an_image_that_is_given_twice_has_one_row(out, table, photos):
    assert embed(out, table, [photos[0], photos[1], photos[0]]) == photos[:2]
    assert_has(out, photos[:2])


def test_many_parts_become_one_table(out, table, photos, monkeypatch):
    """With more rows than a part or a row group holds."""
    monkeypatch.setattr(resume, "PART_ROWS", 2)
    monkeypatch.setattr(parquet, "ROW_GROUP", 5)
    embed(out, table, photos)
    assert list(rows_of(out)) == list(map(str, photos))
    assert_has(out, photos)


def test_a_path_with_invalid_utf8_or_control_characters_is_escaped_and_recognised_again(out, table, photos, tmp_path):
    """Any reader can decode the table, and --prune knows that the files still exist."""
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
    """64-bit nanoseconds end in the year 2262."""
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


def test_an_incomplete_last_line_is_ignored(tmp_path, photos):
    """A killed `clip-embed photos > vectors.jsonl` leaves one."""
    out = tmp_path / "v.jsonl"
    embed(out, jsonl, photos[:3])
    whole = out.read_bytes()
    for cut in (1, 100, 6000):
        out.write_bytes(whole[:-cut])
        assert embed(out, jsonl, photos[:3]) == [photos[2]]
        assert_has(out, photos[:3])


@pytest.mark.parametrize("content", [b"no table\n", b'{"path": "a", "embedding": 1}\n', b"[]\n"])
def test_an_output_that_is_not_a_table_is_refused_and_unchanged(out, table, photos, content):
    out.write_bytes(content)
    with pytest.raises(UnusableOutput, match=str(out)):
        embed(out, table, photos)
    assert out.read_bytes() == content
    assert not parts_folder(out).exists()


def test_a_parquet_file_with_other_columns_is_refused_with_their_names(tmp_path, photos):
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
def test_a_full_disk_loses_no_finished_part(out, table, photos, monkeypatch, full_at):
    """Whether a part or the merged file does not fit, the earlier parts stay and no partial file is left."""
    monkeypatch.setattr(resume, "PART_ROWS", 3)
    calls = 0

    def fsync(_):
        nonlocal calls
        calls += 1
        if calls >= 2 * full_at - 1:  # one call for a file, one for its folder
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
    "Embeds in a child that kills itself at its n-th step, and returns the exit code."
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


embed(folder / f"first.{name}")  # so that late imports take no steps below
reader, writer = os.pipe()
assert run(folder / f"vectors.{name}", report=writer) == 0
steps = int(os.read(reader, 99))
for moment in range(moments):
    kill_at = 1 + moment * steps // moments
    out = folder / f"killed at {kill_at}" / f"vectors.{name}"
    out.parent.mkdir()
    assert run(out, kill_at) == -signal.SIGKILL
    run(out, kill_at * 2 // 3)  # a second kill, unless so few steps are left that it finishes first
    assert run(out) == 0
print(steps)
"""
MOMENTS = {"jsonl": 40, "parquet": 24}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_moment_every_image_is_there_once(out, table, photos, tmp_path, record_reliability, share):
    """kill -9 at moments spread over a whole run, also during a write, and often again while it resumes."""
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
    """The command runs in tmp_path, and its parts hold five images each."""
    brain.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    monkeypatch.setattr(resume, "PART_ROWS", 5)


@pytest.fixture
def run(here):
    """Runs the command and returns its exit code, stdout and stderr."""

    def run(*arguments):
        done = run_here(*arguments, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def start(here):
    """Starts the command as a process, which first runs the Python code `before`."""
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
def test_a_run_that_was_ended_by_a_signal_is_resumed(start, run, brain, out, table, photos, number):
    """The eighth image waits at the server. By then the first five are a part, and they are not embedded again."""
    photos[7].write_bytes(b"wait")
    arguments = ("photos", "--out", out.name, "--resume", "--batch-size=1", "--max-in-flight=1")
    with start(*arguments) as process:
        assert brain.waiting.acquire(timeout=60)
        process.send_signal(number)
        process.wait(60)
        stderr = process.communicate()[1]
    assert not out.exists()
    if number == signal.SIGINT:
        assert stderr == (
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
def test_a_failed_image_is_reported_in_every_run_until_it_is_fixed(run, brain, out, table, photos):
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
def test_finished_rows_are_kept_when_the_server_is_lost(run, out, table, photos):
    """The last line says how to resume."""
    photos[8].write_bytes(b"fail:UNAVAILABLE:Socket closed")
    arguments = ("photos", "-o", out.name, "--resume", "--batch-size=1", "--max-in-flight=1")
    code, _, stderr = run(*arguments, "--timeout-s=2")
    assert code == 3
    assert f"finished rows are kept in {out.name}.parts: run it again with --resume" in stderr.splitlines()[-1]
    photos[8].write_bytes(b"good")
    code, _, stderr = run(*arguments)
    assert (code, stderr) == (0, "8 of the images were there already\n")


def test_a_file_size_limit_exits_2_with_a_message_and_nothing_is_lost(start, run, out, table, photos):
    """The limit is on the size of a file: the parts fit, the merged table does not."""
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
def test_a_run_without_resume_is_refused_while_parts_are_left(run, out, table, photos):
    with pytest.raises(InterruptedError):
        embed(out, table, photos, stop_after=7)
    code, _, stderr = run("photos", "-o", out.name)
    assert code == 2
    assert f"{out.name}.parts has finished rows of an earlier run: add --resume" in stderr
    assert has_parts(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --output FILE"),
        (["--resume", "-o", "v.npy"], "npy does not name its images"),
        (["--resume", "-o", "no/such/v.jsonl"], "cannot write no/such/v.jsonl: No such file or directory"),
        (["--resume", "-o", "photos/00.jpg", "--format", "jsonl"], "photos/00.jpg, line 1: expected"),
        (["--resume", "-o", "/dev/null"], "needs a regular file: /dev/null is not one"),
        (["--prune", "-o", "v.jsonl"], "--prune needs --resume"),
    ],
)
def test_a_usage_error_exits_2_with_one_line(run, photos, arguments, message):
    photos[0].write_bytes(b"a line\n")
    code, stdout, stderr = run("photos", *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_format_follows_the_file_name(run, tmp_path, photos):
    """Without --resume too. A name without a suffix means JSON lines."""
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
    """The row has the size and time that the file had before it was read."""
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
def test_vectors_of_another_provenance_are_not_added_to_a_file(out, table, photos, is_killed, after):
    """Whether the earlier run finished or left its parts. The refused run changes nothing."""
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


def test_a_file_without_provenance_is_resumed_with_a_warning_and_gets_none(run, out, table, photos, brain):
    embed(out, table, photos[:4])
    brain.parameters = {"clip_model": "ViT-B-32", "clip_checkpoint": "tag", "clip_preprocess": "exact"}
    code, _, stderr = run(str(out.parent / "photos"), "--out", out.name, "--resume")
    assert code == 0
    assert "does not name the weights of its vectors" in stderr
    assert_has(out, photos)
    assert table.read_provenance(out) is None
    code, _, stderr = run("photos", "--out", f"new-{out.name}", "--resume")
    assert (code, stderr) == (0, "")
    assert table.read_provenance(out.with_name(f"new-{out.name}")) == Provenance("ViT-B-32", "tag", "exact")
