"""`clip-embed search` prints the nearest images of a library and refuses a library of other weights."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_client_loopback import Brain, serve, vector_of

pytest.importorskip("typer", reason="pip install 'clip-embed[cli]'")

from tests.clip_embed_command import run_here

from clip_embed import parquet
from clip_embed.cli import is_library_command
from clip_embed.output import Format, open_output
from clip_embed.provenance import Provenance, read_sidecar
from clip_embed.table import stat_image

HERE = Provenance("ViT-B-32", "a" * 64, "exact")


@pytest.fixture(scope="module")
def brain():
    brain = Brain()
    brain.parameters = {
        "clip_model": HERE.model,
        "clip_checkpoint": HERE.checkpoint,
        "clip_preprocess": HERE.preprocess,
    }
    return brain


@pytest.fixture(scope="module")
def url(brain):
    with serve("grpc", brain) as url:
        yield url


@pytest.fixture
def run(url, tmp_path, monkeypatch):
    """Runs the command in tmp_path, with 20 images, their vectors in v.npy, and a copy of 07.jpg as same.jpg."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERENCE_SERVICE_URL", url)
    for number in range(20):
        Path(f"{number:02d}.jpg").write_bytes(b"image %d" % number)
    Path("same.jpg").write_bytes(b"image 7")
    library("v.npy", HERE)

    return partial(run_here, text=True)


def library(name: str, provenance: Provenance | None) -> None:
    with open_output(Path(name), Format(Path(name).suffix[1:]), provenance) as output:
        for path in sorted(Path().glob("[0-9]*.jpg")):
            output.add(stat_image(str(path)), vector_of(path.read_bytes()))


def test_the_nearest_come_first_with_their_cosines(run):
    done = run("search", "v.npy", "same.jpg", "-k", "3", "--format", "jsonl")
    assert (done.returncode, "the image same.jpg" in done.stderr) == (0, True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    query = vector_of(b"image 7")
    cosines = {f"{number:02d}.jpg": float(vector_of(b"image %d" % number) @ query) for number in range(20)}
    assert [line["path"] for line in lines] == sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert np.allclose([line["cosine"] for line in lines], sorted(cosines.values(), reverse=True)[:3], atol=1e-5)
    assert run("search", "v.npy", "same.jpg", "-k", "1").stdout.split() == ["cosine", "path", "1.0000", "07.jpg"]


def test_the_html_page_embeds_its_pictures_and_escapes_names(run):
    name = "<b>&.jpg"
    Image.new("RGB", (300, 200), (9, 99, 9)).save(name)
    with open_output(Path("w.npy"), Format.npy, HERE) as output:
        output.add(stat_image(name), vector_of(Path(name).read_bytes()))
        output.add(stat_image("00.jpg"), vector_of(b"image 0"))
    done = run("search", "w.npy", name, "--html", "found.html")
    assert done.returncode == 0
    assert "without thumbnail and size in pixels" in done.stderr
    page = Path("found.html").read_text()
    assert page.count("data:image/webp;base64,") == 2  # the query and its own match; 00.jpg is not an image
    assert "&lt;b&gt;&amp;.jpg" in page
    assert "<b>&" not in page


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_vectors_of_other_weights_are_refused_and_unknown_weights_are_a_warning(run, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")
    library(f"other.{ending}", Provenance("ViT-B-32", "b" * 64, "exact"))
    done = run("search", f"other.{ending}", "same.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has vectors of ViT-B-32, checkpoint bbbbbbbbbbbb..., preprocess exact, but the server has" in done.stderr
    library(f"fast.{ending}", Provenance("ViT-B-32", "a" * 64, "fast"))
    done = run("search", f"fast.{ending}", "same.jpg")
    assert (done.returncode, "made with preprocess fast, the query exact" in done.stderr) == (0, True)
    library(f"old.{ending}", None)
    done = run("search", f"old.{ending}", "same.jpg")
    assert (done.returncode, "does not name the weights of its vectors" in done.stderr) == (0, True)


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("missing.jpg", 2, "missing.jpg: no such file"),
        ("bad.jpg", 1, "bad.jpg: truncated: ends"),
        ("a dog", 3, "no clip_text_ensemble at"),
    ],
)
def test_a_query_that_cannot_be_embedded_exits_with_a_message(run, query, code, message):
    Path("bad.jpg").write_bytes(b"bad:truncated:ends")
    done = run("search", "v.npy", query)
    assert (done.returncode, done.stdout, message in done.stderr) == (code, "", True)


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_texts_are_saved_with_the_weights_of_their_vectors(run, brain, monkeypatch, ending):
    """`--resume` and `search` refuse a server of other weights. Another `preprocess` makes no difference to texts."""
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="pip install 'clip-embed[parquet]'")
    monkeypatch.setattr(brain, "has_texts", True)
    monkeypatch.setattr(brain, "parameters", dict(brain.parameters))
    file, resumes = f"t.{ending}", [] if ending == "npy" else ["--resume"]
    arguments = ("--text", "a dog", "--text", "a cat", "--output", file, *resumes)
    assert run(*arguments).returncode == 0
    provenance = parquet.read_provenance(Path(file)) if ending == "parquet" else read_sidecar(Path(file))
    assert provenance == HERE.of_texts()
    brain.parameters["clip_preprocess"] = "fast"
    done = run(*arguments, "--text", "a fish")
    assert (done.returncode, "2 of the texts were there already" in done.stderr) == (0, bool(resumes))
    if ending != "jsonl":
        found = run("search", file, "a fish", "-k", "1", "--format", "jsonl")
        assert json.loads(found.stdout) == {"path": "a fish", "cosine": 1.0}
        assert "preprocess" not in found.stderr
    brain.parameters["clip_checkpoint"] = "b" * 64
    refused = [run(*arguments)] if resumes else []
    refused += [run("search", file, "a dog")] if ending != "jsonl" else []
    for done in refused:
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            "t." + ending + " has vectors of ViT-B-32, checkpoint aaaaaaaaaaaa..., texts, but the server" in done.stderr
        )
        assert "nearest to" not in done.stderr


def test_a_folder_with_the_name_of_a_command_is_embedded(run, tmp_path):
    """Unless a library follows, as in `search v.npy`: that is the command."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "a.jpg").write_bytes(b"image 7")
    done = run("search")
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["search/a.jpg"]
    assert run("search", "v.npy", "search/a.jpg", "-k", "1").stdout.split()[-1] == "07.jpg"
    assert not is_library_command(["search", "-o", "v.npy"])
    assert is_library_command(["duplicates"])
    assert not is_library_command(["photos", "search"])


def test_an_index_is_kept_and_rebuilt_when_the_library_changes(run):
    """With so few vectors it gives the results of the full search."""
    pytest.importorskip("usearch", reason="pip install 'clip-embed[index]'")
    expected = run("search", "v.npy", "same.jpg").stdout
    made = run("search", "v.npy", "same.jpg", "--index")
    assert (made.returncode, made.stdout) == (0, expected)
    assert "v.npy.usearch: built from 20 vectors" in made.stderr
    assert "finds 100.0% of the 10 nearest" in made.stderr
    again = run("search", "v.npy", "same.jpg", "--index")
    assert (again.stdout, "built from" in again.stderr) == (expected, False)
    Path("00.jpg").unlink()
    library("v.npy", HERE)
    assert "built from 19 vectors" in run("search", "v.npy", "same.jpg", "--index").stderr
