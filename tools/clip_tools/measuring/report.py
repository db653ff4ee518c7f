"""`clip-tools report`: results as Markdown tables and SVG pictures, and docs/benchmarks.md out of the committed ones.

The same JSON gives the same text, so `make lint` can tell whether the documents are those of the results.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_tools.errors import ToolError
from clip_tools.measuring import sections
from clip_tools.measuring.bench_section import bench_section, headline
from clip_tools.measuring.libraries import libraries_section, measured_text
from clip_tools.measuring.preprocess import preprocess_section
from clip_tools.measuring.results import read, write
from clip_tools.measuring.tables import Section
from clip_tools.paths import ROOT

COMMITTED = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SECTIONS: dict[str, tuple[str, Callable[[str, dict[str, Any]], Section]]] = {
    "bench": ("Side by side", bench_section),
    "preprocess": ("Preprocessing alone", preprocess_section),
    "perf": ("A standard load tester", sections.perf_section),
    "serialisation": ("What is sent", sections.serialisation_section),
    "onnx-profile": ("Inside the engine", sections.onnx_section),
    "profile": ("Configurations, by Model Analyzer", sections.tuning_section),
    "sweep": ("Configurations, by our own sweep", sections.tuning_section),
    "tune-precision": ("Precision by layer", sections.precision_section),
    "soak": ("Good and bad traffic over time", sections.soak_section),
    "libraries": ("Search and near-duplicates", libraries_section),
}
"""Kind of a result -> its heading and what turns it into a section. A new verb adds its own here."""


def keep(result: dict[str, Any], output: Path) -> str:
    """Write a result as JSON, with its pictures beside it; returns its text."""
    write(result, output)
    section = SECTIONS[result["kind"]][1](output.stem, result)
    for name, picture in section.pictures.items():
        (output.parent / name).write_text(picture)
    return section.text


def _environment_text(environment: dict[str, Any]) -> str:
    """Where and how a result was measured, in two lines."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']:g} GiB, "
        f"{environment['gpu'] or 'no GPU'}; {environment['date'][:10]}, commit {environment['git_commit']}, "
        f"Python {environment['python']}, {packages}.\n\n    {environment['command']}\n"
    )


def document(results: dict[str, dict[str, Any]], *, pictures_at: str) -> tuple[str, dict[str, str]]:
    """(the Markdown of these results by name, their pictures by file name); `pictures_at` is the links' folder."""
    order = list(SECTIONS)
    for name, result in results.items():
        if result["kind"] not in SECTIONS:
            raise ToolError(f"{name}: expected a result of kind {', '.join(order)}, came {result['kind']}")
    parts = [
        "<!-- Generated from docs/results/*.json by `make docs`. -->\n\n# Benchmarks\n",
        "Each section is one result, a JSON file in [results/](results); CONTRIBUTING says how to add yours.\n",
    ]
    pictures: dict[str, str] = {}
    for name, result in sorted(results.items(), key=lambda item: (order.index(item[1]["kind"]), item[0])):
        title, render = SECTIONS[result["kind"]]
        section = render(name, result)
        parts.append(f"## {title}: {name}\n\n{_environment_text(result['environment'])}\n{section.text.strip()}\n")
        parts += [f"![{Path(picture).stem}]({pictures_at}/{picture})\n" for picture in section.pictures]
        pictures |= section.pictures
    return "\n".join(parts), pictures


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a folder by name, without reliability*.json, which has another document."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json")) if not path.stem.startswith("reliability")}


def committed_documents(folder: Path = COMMITTED, target: Path = DOCUMENT) -> dict[Path, str]:
    """The content of docs/benchmarks.md and its pictures for the committed results; nothing without results."""
    results = _results(folder)
    if not results:
        return {}
    text, pictures = document(results, pictures_at=target.stem)
    return {target: text, **{target.with_suffix("") / name: picture for name, picture in pictures.items()}}


def readme(text: str, folder: Path = COMMITTED) -> str:
    """The README with the figure of the first bench result between its two markers.

    Unchanged without the markers or without a result.
    """
    return _with_figure(text, folder, "bench", headline)


def search_page(text: str, folder: Path = COMMITTED) -> str:
    """docs/search.md with its tables, in the same way."""
    return _with_figure(text, folder, "libraries", measured_text)


def _with_figure(text: str, folder: Path, kind: str, render: Callable[[dict[str, Any]], str]) -> str:
    begin, end = "<!-- figure -->\n", "<!-- /figure -->"
    result = next((one for one in _results(folder).values() if one["kind"] == kind), None)
    if result is None or begin not in text or end not in text:
        return text
    head, rest = text.split(begin, 1)
    return head + begin + render(result) + end + rest.split(end, 1)[1]


def report(folder: Path) -> list[Path]:
    """Write benchmarks.md and its pictures beside the results of a folder; returns the written files."""
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json")) if '"kind"' in path.read_text()[:2000]}
    if not results:
        raise ToolError(f"{folder}: expected results, *.json of clip-tools, found none: run `make bench`")
    text, pictures = document(results, pictures_at=".")
    written = {folder / "benchmarks.md": text, **{folder / name: picture for name, picture in pictures.items()}}
    for path, content in written.items():
        path.write_text(content)
    return list(written)
