"""`python -m clip_tools.c_libraries`: builds the two C libraries of this project with the compiler of ziglang."""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clip_tools.errors import ToolError
from clip_tools.paths import MODELS

# Resamples in `preprocess`; clip_resample.py loads it.
SOURCE = MODELS / "preprocess" / "1" / "clip_resample.c"
# Preloaded into the embedded tritonserver.
IGNORE_CANCELLATION = Path(__file__).with_name("serving") / "ignore_cancellation.c"
# The effect of a missing library.
WITHOUT = {
    SOURCE: "preprocess resamples with Pillow, which takes twice as long",
    IGNORE_CANCELLATION: "clients that cancel gRPC calls may crash the embedded server (SECURITY.md)",
}
# Built for any CPU of the architecture, with manylinux2014's glibc. The library detects CPU extensions at run time.
_PROCESSORS = ("x86_64", "aarch64")
_FLAGS = ("-O3", "-s", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def library_path(source: Path = SOURCE) -> Path:
    """The path of the library built from this source."""
    return source.with_suffix(f".{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so")


def build(source: Path = SOURCE, compiler: Sequence[str] = (sys.executable, "-m", "ziglang", "cc")) -> Path:
    """The library of the source, built if missing; libraries of earlier sources are removed. Raises ToolError."""
    path = library_path(source)
    if path.is_file():
        return path
    if platform.machine() not in _PROCESSORS:
        raise ToolError(f"expected one of the processors {', '.join(_PROCESSORS)}, got {platform.machine()}")
    target = ("-target", f"{platform.machine()}-linux-gnu.2.17", "-mcpu=baseline")
    built = path.with_name(f".{os.getpid()}.so")
    command = [*compiler, *target, *_FLAGS, str(source), "-o", str(built), "-lm"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ToolError(f"{source.name} could not be compiled: {said[-1]}")
    for other in source.parent.glob(f"{source.stem}.*.so"):
        other.unlink()
    built.replace(path)
    return path


def main() -> int:
    """Build both; a line on stderr and exit code 1 if one fails."""
    failed = 0
    for source, loss in WITHOUT.items():
        try:
            build(source)
        except (ToolError, OSError) as error:
            sys.stderr.write(f"{loss}: {error}\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
