"""The pages of `clip-embed` in a real Chromium: slider, order, keyboard, file names. A page fetches nothing."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_embed import gallery
from clip_embed.duplicates import ExistingFile, Group, Keep, Member, check_files, make_groups
from clip_embed.library import Library
from clip_embed.nearest import pairs_above
from clip_embed.previews import read_previews
from clip_embed.table import stat_image

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make setup")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox refuses to run as root, as tests in a container do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page from its file. After the test, asserts that it fetched nothing and had no error."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    requests, failures = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text))

    def open_page(path: Path):
        page.goto(path.as_uri())
        return page

    yield open_page
    assert len([url for url in requests if not url.startswith("data:")]) == 1
    assert failures == []
    page.close()


def vectors_at(degrees: list[float]) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def write_gallery(library: Library, path: Path, *, threshold: float) -> None:
    checked = check_files(library)
    pairs = pairs_above(library.embeddings, threshold)
    rows = sorted({*pairs.first.tolist(), *pairs.second.tolist()})
    previews = dict(zip(rows, read_previews([library.images[row].path for row in rows], thumbnail_px=128), strict=True))
    with path.open("w") as file:
        groups = make_groups(library, pairs, checked.files, previews, Keep.pixels)
        gallery.write_gallery(groups, file, threshold=threshold, about="what it is")


EVIL = '<img src="http:x" onerror="document.title=1">.jpg'  # a file name that the page must not run as HTML


@pytest.fixture
def gallery_page(tmp_path, demo_photos):
    """Four photographs: three sizes of the first at 0, 4 and 10 degrees, two of each other at 1, 2 and 3 degrees."""
    names, degrees = [], []
    for number, photo in enumerate(demo_photos[:4]):
        for scale, turned in ((4, 0), (2, 4), (1, 10)) if number == 0 else ((1, 0), (2, number)):
            with Image.open(photo) as image:
                name = tmp_path / (EVIL if number == 3 and scale == 2 else f"{photo.stem}-{scale}.jpg")
                image.resize((image.width // scale, image.height // scale)).save(name)
            names.append(str(name))
            degrees.append(40 * number + turned)
    library = Library(tmp_path / "v.npy", [stat_image(name) for name in names], vectors_at(degrees), None)
    write_gallery(library, tmp_path / "gallery.html", threshold=0.98)
    return tmp_path / "gallery.html"


def summaries(page) -> list[str]:
    return page.locator("summary").all_inner_texts()


def test_the_slider_splits_the_groups_and_the_counts_follow(opened, gallery_page, demo_photos):
    page = opened(gallery_page)
    first = demo_photos[0].stem
    assert page.inner_text("#count").startswith("4 groups, 9 photographs, ")
    (chain,) = [text for text in summaries(page) if text.startswith("3 photographs")]
    assert chain.endswith(f"{first}-1.jpg")  # the most pixels
    assert page.locator("figure.keep").count() == 4
    page.fill("#slider", "0.996")  # 5.1 degrees: the largest of the three is alone now
    playwright.expect(page.locator("#count")).to_contain_text("4 groups, 8 photographs")
    assert any(text.startswith("2 photographs") and text.endswith(f"{first}-2.jpg") for text in summaries(page))
    page.fill("#slider", "0.999")  # 2.6 degrees
    playwright.expect(page.locator("#count")).to_contain_text("2 groups, 4 photographs")
    assert page.inner_text("#value") == "0.999"


def test_groups_can_be_sorted_and_walked_by_keyboard(opened, gallery_page):
    page = opened(gallery_page)
    for order, key_of in {
        "alike": lambda text: -float(text.partition("cosine up to ")[2].partition(":")[0]),
        "path": lambda text: text.rpartition(": ")[2],
    }.items():
        page.select_option("#order", order)
        keys = list(map(key_of, summaries(page)))
        assert keys == sorted(keys)
        assert len(set(keys)) == 4
    page.locator("#about").click()
    for _ in range(2):
        page.keyboard.press("j")
    assert page.locator("details.current").count() == 1
    assert page.locator("details").nth(1).get_attribute("class") == "current"
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 3
    page.keyboard.press("k")
    assert page.locator("details").nth(0).get_attribute("class") == "current"
    page.keyboard.press("+")
    assert page.inner_text("#value") == "0.981"
    page.click("#toggle")
    assert page.locator("details[open]").count() == 0


def test_pictures_are_inside_the_page_and_file_names_are_escaped(opened, gallery_page, demo_photos):
    page = opened(gallery_page)
    sizes = page.locator("figure img").evaluate_all("images => images.map(one => one.naturalWidth)")
    assert len(sizes) == 9
    assert all(sizes)
    assert page.title() == "Near-duplicates"
    assert page.get_by_text(EVIL).count() == 1
    link = page.locator("figure.keep a").first.get_attribute("href")
    assert link.startswith("file:///")


def test_five_thousand_groups_are_still_quick(opened, tmp_path, demo_photos):
    """Only visible groups are drawn, so the slider reacts at once with 15,000 photographs."""
    with Image.open(demo_photos[0]) as image:
        image.convert("RGB").resize((128, 128)).save(tmp_path / "a.webp", quality=60)
    preview = next(read_previews([str(tmp_path / "a.webp")], thumbnail_px=128))
    groups = [
        Group(
            tuple(
                Member(0, ExistingFile(f"/p/{number:05d}-{place}.jpg", 1000 + place, 0), preview, 1.0)
                for place in range(3)
            ),
            ((0, 1, 0.961 + number % 39 / 1000), (0, 2, 0.97), (1, 2, 0.965)),
        )
        for number in range(5000)
    ]
    page_file = tmp_path / "gallery.html"
    with page_file.open("w") as file:
        gallery.write_gallery(groups, file, threshold=0.96, about="5,000 groups")
    page = opened(page_file)
    assert page.inner_text("#count").startswith("5,000 groups, 15,000 photographs, ")
    assert page.locator("details").count() < 200
    slide = (
        "() => { const began = performance.now(); slider.value = 0.98; redraw(); return performance.now() - began; }"
    )
    assert page.evaluate(slide) < 5000  # 22 ms were measured; drawing all takes far longer
    assert page.inner_text("#count").startswith(f"{sum(number % 39 >= 19 for number in range(5000)):,} groups")
    page.evaluate("slider.value = 0.96; redraw()")
    for _ in range(60):
        page.keyboard.press("j")
    assert page.locator("details.current summary").inner_text().endswith("/p/00059-0.jpg")


def test_search_results_are_written_as_a_page(opened, tmp_path, demo_photos):
    previews = list(read_previews(map(str, demo_photos[:3]), thumbnail_px=256))
    found = [
        (str(path), 0.9 - n / 10, preview) for n, (path, preview) in enumerate(zip(demo_photos, previews, strict=False))
    ]
    with (tmp_path / "found.html").open("w") as file:
        gallery.write_results(found, file, query="a <b>dog</b>", shown=previews[0], about="the nearest of 3")
    page = opened(tmp_path / "found.html")
    assert page.inner_text("h1") == "a <b>dog</b>"
    assert page.locator("img").evaluate_all("images => images.map(one => one.naturalWidth > 0)") == [True] * 4
    assert page.locator("figcaption b").all_inner_texts() == ["0.9000", "0.8000", "0.7000"]
