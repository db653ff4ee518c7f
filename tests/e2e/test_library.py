"""`clip-embed` with the real server, then `search` and `duplicates` on its output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import TINY, options_for

from clip_embed.parquet import read_provenance
from clip_tools.serving.server import EmbeddedServer

COMMAND = Path(sys.executable).with_name("clip-embed")


@pytest.fixture
def run(light_text_repository, tmp_path):
    """Runs the command in tmp_path against a server with both towers."""
    options = options_for(light_text_repository, tmp_path / "log")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "INFERENCE_SERVICE_URL": options.grpc_url}
        done = subprocess.run(
            [COMMAND, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr
        return done

    with EmbeddedServer(options):
        yield run


def test_a_library_is_searched_by_image_and_by_text_and_its_duplicates_are_found(run, tmp_path, demo_photos):
    """Holds for untrained weights too: an image is nearest to itself, and its copy is its duplicate."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in demo_photos:
        (photos / path.name).write_bytes(path.read_bytes())
    first = demo_photos[0]
    with Image.open(first) as image:
        image.save(photos / "copy.png")
    assert run("photos", "-o", "v.parquet").returncode == 0
    provenance = read_provenance(tmp_path / "v.parquet")
    assert (provenance.model, provenance.preprocess) == (TINY.model, "exact")
    found = run("search", "v.parquet", f"photos/{first.name}", "-k", "2", "--format", "jsonl")
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert {row["path"] for row in rows} == {f"photos/{first.name}", "photos/copy.png"}
    assert all(row["cosine"] >= 0.99999 for row in rows)  # FP32, in another batch
    by_text = run("search", "v.parquet", "a cat on a sofa", "-k", "3", "--format", "jsonl", "--html", "found.html")
    assert by_text.returncode == 0, by_text.stderr
    assert "nearest to the text a cat on a sofa" in by_text.stderr
    assert len(by_text.stdout.splitlines()) == 3
    assert (tmp_path / "found.html").read_text().count("data:image/webp") == 3
    assert run("duplicates", "v.parquet", "--threshold", "0.99999", "--json", "d.json").returncode == 0
    groups = json.loads((tmp_path / "d.json").read_text())["groups"]
    assert [{one["path"] for one in group["files"]} for group in groups] == [
        {f"photos/{first.name}", "photos/copy.png"}
    ]
