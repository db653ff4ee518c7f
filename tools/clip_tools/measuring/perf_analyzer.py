"""The real `perf_analyzer` of the tritonclient wheel, runnable from this environment.

The wheel lacks two libraries that its binary needs. Both lie in the nvidia-pytriton wheel, under names with a digest
in them, so links with the plain names go into a folder on the library path.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path

from clip_tools.errors import ToolError, exits_with_reason
from clip_tools.serving.tritonserver import package_dir

# Plain name -> how the wheel names it.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def find_perf_analyzer() -> tuple[Path, dict[str, str]]:
    """(the binary, the environment it needs). Raises ToolError when it is not installed."""
    binary = Path(sys.executable).with_name("perf_analyzer")
    if not binary.is_file():
        raise ToolError(
            "no perf_analyzer here: tritonclient 2.51.0 carries it: pip install 'clip-embed[profile]'", exit_code=2
        )
    parts = [str(_library_links(package_dir().parent / "nvidia_pytriton.libs")), os.environ.get("LD_LIBRARY_PATH", "")]
    return binary, {"LD_LIBRARY_PATH": os.pathsep.join(part for part in parts if part)}


def _library_links(libraries: Path) -> Path:
    """A folder with the two libraries under their plain names; a second call finds it ready."""
    sources: dict[str, Path] = {}
    for name, pattern in _LIBRARIES.items():
        found = sorted(libraries.glob(pattern))
        if not found:
            raise ToolError(f"perf_analyzer needs {name}: expected {pattern} in {libraries}, found none")
        sources[name] = found[-1]
    digest = hashlib.sha256("\0".join(map(str, sources.values())).encode()).hexdigest()[:12]
    target = Path(sys.prefix) / "share" / "clip-tools" / f"perf-libraries-{digest}"
    target.mkdir(parents=True, exist_ok=True)
    for name, path in sources.items():
        with contextlib.suppress(FileExistsError):
            (target / name).symlink_to(path)
    return target


def main() -> None:
    """Become perf_analyzer with the flags given: the command `perf-analyzer`, for people and for Model Analyzer."""
    with exits_with_reason("perf-analyzer"):
        binary, environment = find_perf_analyzer()
    os.execve(binary, [str(binary), *sys.argv[1:]], {**os.environ, **environment})  # noqa: S606
