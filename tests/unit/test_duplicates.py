"""`clip-embed duplicates`: how photographs are grouped, which one is kept, and that the only copy is no duplicate."""

import csv
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer", reason="pip install 'clip-embed[cli]'")

from tests.clip_embed_command import run_here

from clip_embed.names import printable
from clip_embed.output import Format, open_output
from clip_embed.provenance import Provenance
from clip_embed.table import stat_image

run = partial(run_here, text=True)


def vector(angle: float) -> np.ndarray:
    """A unit vector at this angle, in degrees. The cosine of two vectors is the cosine of the angle between them."""
    rows = np.zeros(512, np.float32)
    rows[:2] = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photograph(name: str, *, size_px: int = 8, age_s: int = 0) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (size_px, size_px), (200, 30, 30)).save(name, "JPEG")
    os.utime(name, (1_000_000_000 - age_s,) * 2)


def library(name: str, angles: dict[str, float | None], provenance: Provenance | None = None) -> None:
    with open_output(Path(name), Format(name.rpartition(".")[2]), provenance) as out:
        for path, angle in angles.items():
            out.add(stat_image(path), None if angle is None else vector(angle))


def groups_of(name: str) -> list[list[str]]:
    return [[one["path"] for one in group["files"]] for group in json.loads(Path(name).read_text())["groups"]]


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_connected_photographs_are_one_group_with_the_best_first(here, ending):
    """a-b and b-c are near enough, a-c is not: a chain is one group. The largest picture comes first."""
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")
    for name, size_px in {"a.jpg": 8, "b.jpg": 64, "c.jpg": 16, "other.jpg": 99, "x.jpg": 8, "y.jpg": 8}.items():
        photograph(name, size_px=size_px, age_s=name == "y.jpg")
    angles = {"a.jpg": 0, "b.jpg": 12, "c.jpg": 24, "failed.jpg": None, "other.jpg": 90, "x.jpg": 150, "y.jpg": 151}
    if ending == "parquet":
        del angles["failed.jpg"]  # a Parquet file has no rows for failed images
    library(f"v.{ending}", angles, Provenance("ViT-B-16", "tag", "exact"))
    done = run("duplicates", f"v.{ending}", "--json", "d.json", "--csv", "d.csv")
    assert (done.returncode, done.stdout) == (0, "")
    assert "2 groups of 5 photographs, by 3 pairs" in done.stderr
    assert ("1 that failed" in done.stderr) == (ending == "npy")
    assert groups_of("d.json") == [["b.jpg", "c.jpg", "a.jpg"], ["y.jpg", "x.jpg"]]
    found = json.loads(Path("d.json").read_text())
    assert (found["provenance"]["model"], found["threshold"], found["pairs"]) == ("ViT-B-16", 0.96, 3)
    cosine = round(float(np.cos(np.radians(12))), 6)
    assert [[i, j, round(c, 4)] for i, j, c in found["groups"][0]["pairs"]] == [
        [0, 1, round(cosine, 4)],
        [0, 2, round(cosine, 4)],
    ]
    rows = list(csv.DictReader(Path("d.csv").read_text().splitlines()))
    assert [(row["group"], row["keep"], row["path"]) for row in rows[:2]] == [
        ("1", "True", "b.jpg"),
        ("1", "False", "c.jpg"),
    ]
    assert (rows[0]["width"], rows[0]["mtime"]) == ("64", "2001-09-09T01:46:40+00:00")
    assert run("duplicates", f"v.{ending}", "--threshold", "0.99").stdout == (
        f"keep    y.jpg\n{np.cos(np.radians(1)):.4f}  x.jpg\n\n"
    )


@pytest.mark.parametrize(
    ("keep", "order"),
    [
        ("pixels", "large big old new"),
        ("size", "big large old new"),
        ("oldest", "old big large new"),
        ("newest", "new large big old"),
    ],
)
def test_keep_chooses_which_photograph_is_kept(here, keep, order):
    photograph("large.jpg", size_px=80, age_s=5)
    photograph("big.jpg", size_px=16, age_s=10)
    with Path("big.jpg").open("ab") as file:
        file.write(bytes(9000))
    os.utime("big.jpg", (1_000_000_000 - 10,) * 2)
    photograph("old.jpg", age_s=99)
    photograph("new.jpg")
    library("v.npy", dict.fromkeys(["new.jpg", "old.jpg", "large.jpg", "big.jpg"], 0))
    assert run("duplicates", "v.npy", "--keep", keep, "--json", "d.json").returncode == 0
    assert groups_of("d.json") == [[f"{name}.jpg" for name in order.split()]]


def test_missing_files_and_other_names_of_a_file_are_no_duplicates(here):
    """A user who deletes all but one of each group would lose the only copy. Nor do such files connect a chain."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photograph(name)
    os.link("a.jpg", "hard.jpg")
    Path("soft.jpg").symlink_to("a.jpg")
    angles = {"a.jpg": 0, "hard.jpg": 0, "soft.jpg": 0, "./a.jpg": 0, "gone.jpg": 1, "b.jpg": 45, "between.jpg": 60}
    library("v.npy", angles | {"c.jpg": 75})
    done = run("duplicates", "v.npy", "--json", "d.json")
    assert groups_of("d.json") == []
    assert "left out: 2 that no longer exist" in done.stderr
    assert "3 that are other names of the same files" in done.stderr


def test_unreadable_and_changed_images_are_reported_and_any_file_name_is_written_safely(here):
    names = ["</script><img src=x>.jpg", "caf\udce9\n.jpg"]
    for name in names:
        photograph(name)
    Path("empty.jpg").touch()
    Path("old.jpg").touch()
    library("v.parquet", dict.fromkeys([*names, "empty.jpg", "old.jpg"], 0))
    Path("old.jpg").write_bytes(b"changed")
    done = run("duplicates", "v.parquet", "--json", "d.json", "--html", "d.html")
    assert done.returncode == 0
    assert sorted(groups_of("d.json")[0]) == sorted([*map(printable, names), "empty.jpg"])
    assert "without thumbnail and size in pixels: 1" in done.stderr
    assert "left out: 1 that have changed since" in done.stderr
    page = Path("d.html").read_text()
    assert page.count("</script>") == 2
    assert "caf%E9%0A.jpg" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.npy"], "missing.npy: expected a .parquet or .npy file that clip-embed wrote, found none"),
        (["v.jsonl"], "expected a name that ends with .parquet or .npy"),
        (["bare.npy"], "bare.npy.paths is missing: expected it beside bare.npy"),
        (["text.npy"], "text.npy is not a .npy file"),
        (["v.npy"], "none of the 1 files of v.npy exists: run this in the folder that clip-embed ran in"),
        (["v.npy", "--threshold", "0.2"], "--threshold"),
        (["there.npy", "--html", "no/such/d.html"], "No such file or directory"),
    ],
)
def test_a_usage_error_exits_2_with_the_reason(here, arguments, says):
    photograph("a.jpg")
    library("v.npy", {"nowhere.jpg": 0})
    library("there.npy", {"a.jpg": 0})
    Path("v.jsonl").touch()
    np.save("bare.npy", np.zeros((1, 512), np.float32))
    Path("text.npy").write_text("no array")
    done = run("duplicates", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in " ".join(done.stderr.split())


def test_without_duplicates_there_is_no_group_but_the_page_is_written(here):
    photograph("a.jpg")
    library("v.npy", {"a.jpg": 0})
    done = run("duplicates", "v.npy", "--html", "d.html", "--csv", "d.csv")
    assert (done.returncode, "0 groups of 0 photographs" in done.stderr) == (0, True)
    assert Path("d.html").stat().st_size > 1000
