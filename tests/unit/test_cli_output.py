"""Output files are replaced atomically and keep their kind, mode and owner. A failed run leaves nothing behind."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_client_loopback import vector_of

from clip_embed import parquet
from clip_embed.atomic_file import is_special, resolve_link
from clip_embed.library import read_library
from clip_embed.names import original, printable
from clip_embed.output import Format, open_output
from clip_embed.provenance import Provenance, read_sidecar
from clip_embed.table import UnusableOutput, parts_folder, stat_image


def write(out: Path, file_format: Format = Format.jsonl, image: str = "a.jpg") -> None:
    with open_output(out, file_format) as output:
        output.add(stat_image(image), vector_of(b"a"))


def paths_in(content: bytes) -> list[str]:
    return [json.loads(line)["path"] for line in content.splitlines()]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """After a failure the old file is unchanged, and no other file is beside it."""
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    def write_and_fail():
        with open_output(out, Format.jsonl) as output:
            output.add(stat_image("a.jpg"), vector_of(b"a"))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_and_fail()
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
    write(out)
    assert paths_in(out.read_bytes()) == ["a.jpg"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("file_format", [Format.jsonl, Format.npy])
def test_the_next_run_removes_what_a_killed_run_left(tmp_path, file_format):
    """Its unfinished file is in a folder that is not hidden."""
    out = tmp_path / f"out.{file_format}"
    kill = f"""
import os, signal
from pathlib import Path
from clip_embed.output import *
with open_output(Path({str(out)!r}), Format.{file_format}) as output:
    output.add(stat_image("a.jpg"), np.ones(512, np.float32))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -9
    assert list(tmp_path.iterdir()) == [parts_folder(out)]
    write(out, file_format)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name] + ["out.npy.paths"] * (file_format == "npy")


def test_two_runs_cannot_write_one_file(tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    with open_output(out, Format.jsonl) as output:
        for other in (out, resolve_link(tmp_path / "link.jsonl")):
            with pytest.raises(UnusableOutput, match="in use by another clip-embed"):
                write(other)
        output.add(stat_image("b.jpg"), vector_of(b"b"))
    assert paths_in(out.read_bytes()) == ["b.jpg"]


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, target_exists):
    target, link, first = tmp_path / "disk" / "out.jsonl", tmp_path / "out.jsonl", tmp_path / "first"
    target.parent.mkdir()
    if target_exists:
        target.write_text("old")
    link.symlink_to("disk/out.jsonl")
    first.symlink_to(link)
    write(resolve_link(first))
    assert link.is_symlink()
    assert paths_in(target.read_bytes()) == ["a.jpg"]
    assert list(target.parent.iterdir()) == [target]


def test_a_link_to_itself_is_an_error(tmp_path):
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        write(resolve_link(loop))
    assert loop.is_symlink()


@pytest.mark.parametrize("file_format", [Format.jsonl, Format.npy])
def test_a_fifo_is_written_to_and_stays(tmp_path, file_format):
    """The shell passes one for `>(gzip > x)`. NPY is written at the end, because its header has the number of rows."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    content = []
    reader = threading.Thread(target=lambda: content.append(fifo.read_bytes()))
    reader.start()
    write(resolve_link(fifo), file_format)
    reader.join(10)
    assert is_special(fifo)
    if file_format is Format.jsonl:
        assert paths_in(content[0]) == ["a.jpg"]
    else:
        (tmp_path / "read.npy").write_bytes(content[0])
        assert np.array_equal(np.load(tmp_path / "read.npy"), [vector_of(b"a")])


def test_a_device_is_written_to_and_stays(tmp_path):
    """Through a link too. A folder is an error."""
    link = tmp_path / "out.jsonl"
    link.symlink_to("/dev/null")
    write(resolve_link(link))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert list(tmp_path.iterdir()) == [link]
    with pytest.raises(IsADirectoryError):
        write(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_mode_and_owner_stay(tmp_path, mode):
    out = tmp_path / "out.jsonl"
    out.touch()
    if os.geteuid() == 0:
        os.chown(out, 4321, 4321)
    out.chmod(mode)
    before = out.stat()
    with open_output(out, Format.jsonl) as output:
        (unfinished,) = parts_folder(out).iterdir()
        assert stat.S_IMODE(unfinished.stat().st_mode) == mode  # the unfinished file is no more readable
        output.add(stat_image("a.jpg"), vector_of(b"a"))
    after = out.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as another user")
def test_another_users_file_keeps_its_owner_and_a_read_only_one_is_refused(tmp_path):
    """A user who may not change the owner of a file overwrites it in place."""
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:  # one of them is the xdist worker's
        folder.chmod(folder.stat().st_mode | 0o055)
    theirs, read_only = tmp_path / "theirs.jsonl", tmp_path / "read-only.jsonl"
    for path, mode in ((theirs, 0o666), (read_only, 0o444)):
        path.write_text("old" * 9999)
        os.chown(path, 4321, 4321)
        path.chmod(mode)
    as_another = f"""
import os
from pathlib import Path
from clip_embed.output import *
os.setgroups([]); os.setgid(1234); os.setuid(1234)
for path in ({str(theirs)!r}, {str(read_only)!r}):
    with open_output(Path(path), Format.jsonl) as output:
        output.add(stat_image("a.jpg"), np.ones(512, np.float32))
"""
    done = subprocess.run([sys.executable, "-c", as_another], check=False, capture_output=True, text=True)
    assert done.stderr.endswith("PermissionError: [Errno 13] Permission denied\n")
    assert (theirs.stat().st_uid, stat.S_IMODE(theirs.stat().st_mode)) == (4321, 0o666)
    assert paths_in(theirs.read_bytes()) == ["a.jpg"]
    assert read_only.read_text() == "old" * 9999


def test_hard_links_to_a_file_have_the_new_content(tmp_path):
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    out.write_text("old" * 9999)
    other.hardlink_to(out)
    write(out)
    assert paths_in(other.read_bytes()) == paths_in(out.read_bytes()) == ["a.jpg"]


def test_every_name_is_made_printable_and_restored():
    """Common names stay unchanged: accents, emoji, no-break spaces, Windows' separators."""
    plain = ["a b.jpg", "Größe.jpg", "👨\u200d👩\u200d👧.jpg", "at 5.00\u202fPM.png", r"p\u.jpg"]
    assert [printable(name) for name in plain] == plain
    odd = [
        *(b"caf\xe9.jpg", b"\xff\xfe", b"a\nb\tc\r", b"\x1b[31mred", b"\x07\x7f\x9b", b"\\udce9", b"\\u001b\x1b"),
        *(b"\\\\u000a", b"\\u00\n", "\u202egpj.exe\u2028".encode(), b"\\u005cu000a", b"\xed\xb3\xa9"),
    ]
    for name in map(os.fsdecode, odd):
        shown = printable(name)
        assert shown != name
        assert shown.isprintable()
        assert shown.encode().decode() == shown
        assert original(shown) == name
    assert len({printable(os.fsdecode(name)) for name in odd}) == len(odd)


@pytest.mark.parametrize("file_format", list(Format))
def test_provenance_is_saved_with_the_vectors_and_replaced_with_them(tmp_path, file_format):
    """In Parquet's metadata or in a file beside it. A file that is replaced does not keep the old provenance."""
    if file_format is Format.parquet:
        pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")
    read = parquet.read_provenance if file_format is Format.parquet else read_sidecar
    out, known = tmp_path / f"out.{file_format}", Provenance("ViT-B-32", "0" * 64, "exact")
    for provenance in (known, None):
        with open_output(out, file_format, provenance) as output:
            output.add(stat_image("a.jpg"), vector_of(b"a"))
        assert read(out) == provenance
    with pytest.raises(RuntimeError), open_output(out, file_format, known):
        raise RuntimeError
    assert read(out) is None


@pytest.mark.parametrize("size", [1, 768, 1024])
def test_rows_are_as_long_as_the_served_models_vectors(tmp_path, size):
    """Also if the first images failed, when the length is not known yet."""
    for file_format in (Format.npy, Format.parquet):
        with open_output(tmp_path / f"out.{file_format}", file_format) as output:
            output.add(stat_image("bad.jpg"), None)
            output.add(stat_image("a.jpg"), np.ones(size, np.float32))
            output.add(stat_image("bad.jpg"), None)
    rows = np.load(tmp_path / "out.npy")
    assert rows.shape == (3, size)
    assert np.isnan(rows).any(axis=1).tolist() == [True, False, True]
    pyarrow = parquet.require_pyarrow()
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["embedding"].to_pylist() == [[1.0] * size]
    for path in (tmp_path / "out.npy", tmp_path / "out.parquet"):
        assert read_library(path).embeddings.shape[1] == size


def test_parquet_files_with_vectors_of_two_lengths_are_not_merged(tmp_path):
    for size in (512, 768):
        with open_output(tmp_path / f"{size}.parquet", Format.parquet) as output:
            output.add(stat_image("a.jpg"), np.ones(size, np.float32))
    parts = [tmp_path / "512.parquet", tmp_path / "768.parquet"]
    with (
        (tmp_path / "all.parquet").open("wb") as file,
        pytest.raises(UnusableOutput, match="one length, got 512, 768"),
    ):
        parquet.merge(parts, file, lambda _: True)
