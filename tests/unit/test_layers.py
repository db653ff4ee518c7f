"""Which packages of `clip_tools` may import which, as in CONTRIBUTING.md."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

from clip_tools.paths import ROOT

TOOLS = ROOT / "tools" / "clip_tools"
# Lowest first. A layer may import itself and those before it. A name is a package or a module of clip_tools.
LAYERS = [
    {
        "c_libraries",
        "digest",
        "edits",
        "errors",
        "gpu",
        "in_process",
        "option_types",
        "oracle",
        "paths",
        "photos",
        "progress",
        "proxy",
        "repository",
    },
    {"accuracy"},
    {"export"},
    {"quantization"},
    {"tensorrt"},
    {"serving"},
    {"container", "demo"},
    {"measuring"},
    {"embed_dataset", "local_transport", "precision_results", "reliability", "verify"},
    {"cli"},
    {"__main__", "audit", "docs"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports_of(file: Path) -> Iterator[str]:
    """The modules of clip_tools that a file imports, such as "serving.serve". Imports inside functions count too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clip_tools":
            for name in node.names:
                full = f"{node.module}.{name.name}".removeprefix("clip_tools.")
                yield full if is_module(full) else full.rpartition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (one.name[11:] for one in node.names if one.name.startswith("clip_tools."))


def is_module(name: str) -> bool:
    path = TOOLS / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def graph() -> dict[str, set[str]]:
    files = {file.relative_to(TOOLS).with_suffix(""): file for file in TOOLS.rglob("*.py")}
    named = {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items() if path.name}
    return {name: set(imports_of(file)) - {"", name} for name, file in named.items() if name != "__init__"}


def test_no_module_imports_one_of_a_later_layer():
    upward = [
        f"{module} imports {imported}"
        for module, found in graph().items()
        for imported in found
        if RANK[module.split(".")[0]] < RANK[imported.split(".")[0]]
    ]
    assert upward == []


def test_there_is_no_import_cycle():
    list(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError, which names the cycle
